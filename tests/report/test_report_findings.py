"""On what the study logged, the report finds what reading its logs found."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_up_runs import LEVELS, write_codes, write_recipe, write_run

from reproduce.recipe import load_recipe
from reproduce.records import METRIC_COLUMNS, RunRecord, Stage, WorkFolder
from reproduce.report.findings import diagnostics, findings
from reproduce.report.headlines import measured_noise, range_by_accident
from reproduce.report.measured import Work, read_work
from reproduce.report.published import load_published
from reproduce.shipped import shipped

FRAMES = 16 * 499
"""Of a micro-batch of 16 crops of 10 s."""
NAMES = {
    "contrastive": "contrastive_loss", "diversity": "diversity_loss", "lr": "learning_rate",
    "ctc": "ctc_loss",
}  # fmt: skip


def logged(stage: Stage) -> dict[str, list[dict[str, str | float]]]:
    """Rows of the study's log by arm, under the names of ``metrics.csv``."""
    path = shipped("results", "published", "data", f"log_{stage}.csv")
    found: dict[str, list[dict[str, str | float]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] not in ("train", "valid"):
                continue
            renamed = {NAMES.get(key, key): value for key, value in row.items() if value}
            found[row["arm"]].append(
                {key: value for key, value in renamed.items() if key in METRIC_COLUMNS[stage]}
            )
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The printed run logs as runs of the as-run recipe.

    What they don't print follows from what was run: the weight of ICSL from the masked count (0.1
    divided by it, and 100 beside 4 accumulations for 2 codebooks), the rate in fine-tuning from a
    warm-up of a fifth of 30 x 357 steps, one an update.
    """
    root = tmp_path_factory.mktemp("study")
    recipe = load_recipe("as-run").model_dump(mode="json")
    root.joinpath("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for stage in ("pretrain", "finetune"):
        for arm, rows in logged(stage).items():
            folder = WorkFolder(root).run(stage, arm, 42)
            folder.root.mkdir(parents=True)
            for row in rows:
                if row["split"] == "valid":
                    continue
                if stage == "finetune":
                    row["learning_rate"] = 1e-4 * float(row["update"]) / (0.2 * 30 * 357)
                elif "icsl" in row:
                    count = float(row["mask_fraction"]) * FRAMES
                    row["icsl_effective_weight"] = (400 if arm == "icsl_2cb" else 0.1) / count
            with folder.metrics.open("w", newline="") as file:
                writer = csv.DictWriter(file, METRIC_COLUMNS[stage], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            RunRecord(arm, 42, status="finished").write(folder.record)
    return read_work(root)


@pytest.fixture(scope="module")
def stated(study: Work) -> dict[tuple[Stage, str], str]:
    found = findings(load_published(), [study])
    return {(item.stage, item.topic): item.text for item in found if item.recipe}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", text)]


def test_masking(stated: dict[tuple[Stage, str], str]) -> None:
    """3.8 to 6.1 % of the frames, against 49 %."""
    text = stated["pretrain", "masking"]
    low, high = re.findall(r"([\d.]+) to ([\d.]+) % from one logged window", text)[0]
    assert float(low) == 3.8
    assert 6.0 <= float(high) <= 6.1
    assert "of wav2vec 2.0's 49 %" in text


def test_weight_and_value_of_icsl(stated: dict[tuple[Stage, str], str]) -> None:
    """2.1e-4 to 3.6e-4 for 8 codebooks, whose value didn't move; about 1 for 2, whose did."""
    two, eight = stated["pretrain", "ICSL"].split("; ")
    low, high = numbers(eight)[:2]
    assert 2.1e-4 <= low < high <= 3.6e-4
    assert "with 8 codebooks, its value going from 0.7515 to 0.7516" in eight
    low, high = numbers(two)[:2]
    assert 0.8 <= low < 1 < high <= 1.4
    assert "with 2 codebooks, its value going from 0.7514 to 0.7197" in two


def test_learning_rates(stated: dict[tuple[Stage, str], str]) -> None:
    """Pretraining stopped with the rate at 6.9e-5, fine-tuning within its warm-up."""
    assert "was 6.88e-05 at the last logged update (724)" in stated["pretrain", "learning rate"]
    assert "0.63 of the recipe's 0.0001" in stated["finetune", "learning rate"]


def test_what_was_printed_and_recognized(stated: dict[tuple[Stage, str], str]) -> None:
    """For 4 levels 3.8731 was printed, validation was 4.5378; without RVQ 4.1153 and 5.3880."""
    text = stated["finetune", "what was printed"]
    assert "is 0.66 to 1.27 nats" in text
    assert "1.27 (no_rvq); 0.66 (rvq_4)" in text


def test_updates_to_a_loss_and_area_of_each_arm(study: Work, tmp_path: Path) -> None:
    headings, rows = diagnostics(study, "finetune")
    speed = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    column = "updates to 5.388 in validation"  # where no_rvq ends, the worse of the two
    assert {arm: cells[column] for arm, cells in speed.items()} == {
        "no_rvq": "1350", "rvq_4": "1125"
    }  # fmt: skip
    height = "area, validation"
    assert float(speed["rvq_4"][height]) < float(speed["no_rvq"][height])
    write_recipe(tmp_path, finetune=LEVELS, pretrain=[])
    write_run(tmp_path, "finetune", "rvq_4", 1, 3.0, status="interrupted")
    assert diagnostics(read_work(tmp_path), "finetune")[1] == []


@pytest.mark.parametrize(("rows", "seeds"), [(4, 3), (5, 5)])
def test_a_table_of_noise_is_seldom_called_more(rows: int, seeds: int) -> None:
    """Highest against lowest of a table without any effect: 5 % "yes", where a threshold for a
    pair would say it in 20 to 30."""
    rng, trials, arms = np.random.default_rng(0), 400, 4
    freedom = arms * (seeds - 1)
    factor = range_by_accident(np.eye(seeds)[[0] * arms].tolist(), rows)
    quantile = factor[0] / factor[1]
    assert factor[2] == freedom
    false = 0
    for _ in range(trials * 10):
        table, groups = rng.normal(0, 1, rows), rng.normal(0, 1, (arms, seeds))
        pooled = math.sqrt(float(groups.var(1, ddof=1).mean()))
        false += float(np.ptp(table)) > quantile * pooled
    assert false / (trials * 10) == pytest.approx(0.05, abs=0.011)


def test_the_noise_sentence_counts_the_rows_of_the_table(tmp_path: Path) -> None:
    """0.0058 is more than a pair differs by at this spread, and not more than four values do."""
    write_recipe(tmp_path, pretrain=["icsl_2cb", "icsl_8cb"], seeds=[1, 2, 3])
    for arm in ("icsl_2cb", "icsl_8cb"):
        for seed in (1, 2, 3):
            write_run(tmp_path, "pretrain", arm, seed, 4.6 + 0.00135 * seed, points=8)
    text = measured_noise(load_published(), read_work(tmp_path), "pretrain")
    assert "more than noise? No, by the spread" in text
    assert "the highest and the lowest of 4 runs of one arm" in text
    assert "studentized range" in text


def test_what_codes_take_and_leave(tmp_path: Path) -> None:
    """Two levels of 16 equal codes take 8 bits and leave half the error of the first."""
    write_recipe(tmp_path, finetune=["no_rvq", "rvq_2"], pretrain=[])
    for arm, loss in (("no_rvq", 3.0), ("rvq_2", 3.25)):
        run = write_run(tmp_path, "finetune", arm, 1, loss)
        if arm != "no_rvq":
            write_codes(run, rows=2, entries=64, used=16)
    work = read_work(tmp_path)
    found = {item.topic: item.text for item in findings(load_published(), [work])}
    text = found["compactness"]
    assert "rvq_2 8.0 bits, error 0.5, CTC 3.25" in text
    assert "as float32 numbers: 256 bits" in text  # 8 dimensions
    assert text.endswith("without RVQ CTC 3.00.")
