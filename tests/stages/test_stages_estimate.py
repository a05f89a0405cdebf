"""``--estimate``: time and memory from a few timed updates, and nothing left behind."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import make_work, tiny_recipe

from reproduce.grid import estimate
from reproduce.grid.estimate import estimate_lines
from reproduce.records import RunFolder, WorkFolder
from reproduce.training.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """Rows are written at known times: 10 s before the first, 2 s an update, 3 s a validation."""
    read, seen = estimate._read, []

    def timed(run: RunFolder, *more: object) -> object:
        seen.append(run)
        with run.metrics.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            update = int(row["update"])
            row["wall_seconds"] = str(10 + 2 * update + 3 * (row["split"] == "valid"))
        with run.metrics.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return read(run, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "_read", timed)
    return seen


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_times_are_those_of_the_whole_grid(tmp_path: Path, clock: list[RunFolder]) -> None:
    work = make_work(tmp_path / "w")  # 21 utterances to train on, 5 to validate on
    before = files(tmp_path)
    recipe = tiny_recipe(
        "corrected", work, "seeds=[1, 2]", "pretrain.updates=10", "finetune.updates=6",
        "pretrain.arms=[no_icsl_2cb, icsl_8cb]", "finetune.arms=[no_rvq, rvq_2]",
    )  # fmt: skip
    lines = list(estimate_lines(recipe, work, ONE, ["pretrain", "finetune"], None, recipe.seeds))
    # a micro-batch 2 s, 4 an update; 2 batches of validation each 4 updates (10 / 4: three times)
    assert lines[0] == (
        "estimate  pretrain: 8 s an update, 6 s a validation; 98 s each, 4 runs 7 min"
    )
    assert lines[2] == (
        "estimate  finetune: 8 s an update, 6 s a validation; 60 s each, 4 runs 4 min"
    )
    assert "timed on prepared speech, 1 of 4 micro-batches each" in lines[1]
    assert re.search(r"[\d.]+ [MG]iB of memory \(CPU\)", lines[1])
    assert [run.arm for run in clock] == ["icsl_8cb", "no_icsl_2cb", "rvq_2"]  # an encoder for it
    assert files(tmp_path) == before


def test_before_anything_is_prepared(tmp_path: Path, clock: list[RunFolder]) -> None:
    work = WorkFolder(tmp_path / "none")
    made = make_work(tmp_path / "w")
    recipe = tiny_recipe("as-written", made, "finetune.updates=5", "finetune.max_seconds=1.0")
    lines = list(estimate_lines(recipe, work, ONE, ["finetune"], ["no_rvq", "rvq_4"], [1]))
    assert "without validation: known after w2vrep prepare" in lines[0]
    assert "1 bank of 2 arms" in lines[0]
    assert "no_rvq+rvq_4 timed on noise" in lines[1]
    assert not work.root.exists()


def test_an_encoder_that_cannot_be_had(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "none")
    made = make_work(tmp_path / "w")
    recipe = tiny_recipe("corrected", made, f"finetune.encoder={tmp_path}/nothing")
    (line,) = estimate_lines(recipe, work, ONE, ["finetune"], None, [1])
    assert line.startswith("estimate  finetune: not known, ")
    assert "no such folder" in line


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.01234, "0.0123 s"), (99.0, "99 s"), (3000.0, "50 min"), (36_000.0, "10.0 h"),
     (864_000.0, "10 days")],
)  # fmt: skip
def test_seconds_for_people(seconds: float, shown: str) -> None:
    assert estimate._time(seconds) == shown
