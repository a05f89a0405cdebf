from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from reproduce.recipe import load_recipe
from reproduce.report.claims import published_claims
from reproduce.report.measured import flatten
from reproduce.report.published import CHANCE, load_published
from reproduce.shipped import shipped

DATA = sorted(shipped("results", "published", "data").glob("*.csv"))
PUBLISHED = load_published()


def test_chance() -> None:
    assert pytest.approx(math.log(101)) == CHANCE
    assert PUBLISHED.chance_gap == pytest.approx(CHANCE - 4.61175)


def test_tables_as_printed() -> None:
    numbers = {arm: number.text for (_, arm), number in PUBLISHED.numbers.items()}
    assert numbers == {
        "no_icsl_2cb": "4.6141", "icsl_2cb": "4.6133", "no_icsl_4cb": "4.6146",
        "icsl_4cb": "4.6126", "no_icsl_8cb": "4.6178", "icsl_8cb": "4.6120",
        "no_icsl_16cb": "4.6173", "icsl_16cb": "4.6117", "no_rvq": "4.1153", "rvq_1": "4.59",
        "rvq_2": "4.07", "rvq_4": "3.87", "rvq_8": "3.85", "rvq_16": "3.99",
    }  # fmt: skip
    not_in_a_table = {arm for (_, arm), number in PUBLISHED.numbers.items() if not number.tabled}
    assert not_in_a_table == {
        "no_icsl_4cb", "icsl_4cb", "no_icsl_16cb", "icsl_16cb", "no_rvq"
    }  # fmt: skip


def test_margins() -> None:
    assert PUBLISHED.margins == pytest.approx({"pretrain": 0.0004, "finetune": 0.01})


def test_curves_end_where_the_logs_do() -> None:
    assert PUBLISHED.curves["pretrain", "train", "icsl_8cb"].updates[[0, -1]].tolist() == [10, 724]
    assert len(PUBLISHED.curves["pretrain", "valid", "icsl_2cb"]) == 17
    no_rvq = PUBLISHED.curves["finetune", "valid", "no_rvq"]
    assert (no_rvq.updates[-1], no_rvq.values[-1]) == (1350, 5.388)
    assert PUBLISHED.curves["finetune", "train", "rvq_4"].values[-1] == 3.8731


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_row_of_data_names_its_source(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["source"] for row in rows)
    if path.stem not in ("claims", "claim_tests", "configuration"):
        assert all(row["exactness"] and float(row["plus_minus"]) > 0 for row in rows)


def test_the_published_numbers_say_what_the_claims_say() -> None:
    unpublished = []
    for result in published_claims(PUBLISHED):
        for part in result.parts:
            if part.published is None:
                unpublished.append(f"{result.claim.name}.{part.part.number}")
                continue
            margin = PUBLISHED.margins[part.part.stage]
            assert {
                "below": part.published < 0,
                "above": part.published > 0,
                "within": abs(part.published) <= margin,
                "not above": part.published <= margin,
            }[part.part.expected], (result.claim.name, part.part.number)
    # no codes, no second seed, no arms but those of the tables
    assert unpublished == ["C7.1", "C7.2", "C8.2", "C9.1", "C9.2", "C9.3", "C9.4", "C10.1", "C10.2",
                           "C11.2"]  # fmt: skip


def test_configuration_names_real_recipe_keys() -> None:
    known = {key for key, _ in flatten(load_recipe("as-written").model_dump())}
    for row in PUBLISHED.configuration:
        for key in row["recipe_keys"].split():
            assert any(k == key or k.startswith(f"{key}.") for k in known), key
