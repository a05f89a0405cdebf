"""One process or several: the same run, to within the order of floating-point sums.

In float32 such a difference can turn the choice of a code between two that are all but equally
good, and the runs then part. So most tests here compute in float64, with a tolerance to match.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    assert_rows_close,
    command,
    command_in_float64,
    rows,
    train,
    weights,
)

from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder

FLOAT32, FLOAT64 = 1e-5, 1e-9
CSV = 1e-8
"""metrics.csv has nine digits."""
NOISY = ["model.layer_drop=0.3", "model.dropout=0.2"]


def runs_of(
    base: WorkFolder,
    folder: Path,
    worlds: Sequence[int],
    stage: Stage,
    protocol: str,
    arms: Sequence[str],
    *sets: str,
    target: Callable[[Sequence[str]], None] = command_in_float64,
) -> dict[int, list[RunFolder]]:
    """The arms trained by each number of processes, each in a work folder of its own."""
    found = {}
    for world in worlds:
        work = WorkFolder(folder / f"{world}-processes")
        shutil.copytree(base.root, work.root)
        shutil.rmtree(work.root / "finetune", ignore_errors=True)
        if stage == "pretrain":
            shutil.rmtree(work.root / "pretrain")
        options = [word for arm in arms for word in ("--arm", arm)]
        options += [word for text in sets for word in ("--set", text)]
        train(stage, protocol, work, *options, world=world, target=target)
        found[world] = [work.run(stage, arm, 1) for arm in arms]
    return found


def check(found: dict[int, list[RunFolder]], tolerance: float) -> None:
    for place, alone in enumerate(found[1]):
        expected = weights(alone)
        for world in list(found)[1:]:
            run = found[world][place]
            assert RunRecord.read(run.record).world_size == world
            for name, weight in weights(run).items():
                difference = float((weight.double() - expected[name].double()).abs().max())
                assert difference <= tolerance, f"{name} on {world} processes"
            assert_rows_close(rows(run), rows(alone), max(tolerance, CSV))


@pytest.mark.parametrize(
    ("protocol", "arm", "accumulation", "worlds"),
    [
        ("corrected", "icsl_2cb", 3, (1, 2, 4)),  # 2 and 1; one of four is idle
        ("as-run", "icsl_2cb", 4, (1, 2)),  # weighted; 11 micro-batches an epoch: 4, 4, 3
    ],
)
def test_pretraining(
    base: WorkFolder,
    tmp_path: Path,
    protocol: str,
    arm: str,
    accumulation: int,
    worlds: Sequence[int],
) -> None:
    """Ten updates with dropout, layer drop and Gumbel noise."""
    sets = [f"pretrain.accumulation={accumulation}", *NOISY]
    found = runs_of(base, tmp_path, worlds, "pretrain", protocol, [arm], *sets)
    check(found, FLOAT64)
    codes = np.load(found[1][0].codes)  # they did move, by far more than any tolerance
    assert np.abs(codes["codebooks_last"] - codes["codebooks_first"]).max() > 100 * FLOAT32


def test_pretraining_in_float32(base: WorkFolder, tmp_path: Path) -> None:
    """1 x 4, 2 x 2 and 4 x 1, as users run it."""
    arms, worlds = ["icsl_8cb"], (1, 2, 4)
    check(
        runs_of(base, tmp_path, worlds, "pretrain", "corrected", arms, *NOISY, target=command),
        FLOAT32,
    )


@pytest.mark.parametrize(
    ("protocol", "arms", "worlds", "keep"),
    [
        ("corrected", ["rvq_2"], (1, 4), "no"),  # a trained encoder; codebooks move by sums
        ("as-written", ["no_rvq", "rvq_1", "rvq_4"], (1, 2), "no"),  # a bank over a frozen one
        ("as-written", ["no_rvq", "rvq_1", "rvq_4"], (1, 2), "float32"),
    ],
    ids=["trained encoder", "bank", "bank on kept features"],
)
def test_finetuning(
    base: WorkFolder,
    tmp_path: Path,
    protocol: str,
    arms: Sequence[str],
    worlds: Sequence[int],
    keep: str,
) -> None:
    sets = ["finetune.accumulation=3", "finetune.head_dropout=0.1"]
    sets += [f"finetune.keep_features={keep}"]
    check(runs_of(base, tmp_path, worlds, "finetune", protocol, arms, *sets), FLOAT64)
    kept = [list(tmp_path.glob(f"{world}-processes/features/*.float32")) for world in worlds]
    assert [len(files) for files in kept] == [0 if keep == "no" else 2] * len(worlds)


def test_all_ranks_see_a_divergence(base: WorkFolder, tmp_path: Path) -> None:
    """And end alike, with the code of it."""
    shutil.copytree(base.root, tmp_path / "wild")
    work = WorkFolder(tmp_path / "wild")
    options = ["--arm", "icsl_2cb", "--set", "pretrain.optimizer.learning_rate=1e30"]
    train("pretrain", "corrected", work, *options, world=2, expected=4)
    record = RunRecord.read(work.run("pretrain", "icsl_2cb", 1).record)
    assert (record.status, record.outcome) == ("failed", "diverged")


def test_all_ranks_leave_out_a_run_whose_encoder_is_missing(
    base: WorkFolder, tmp_path: Path
) -> None:
    """And do the next one together."""
    shutil.copytree(base.root, tmp_path / "missing")
    work = WorkFolder(tmp_path / "missing")
    options = ["--arm", "no_rvq", "--set", "seeds=[2,1]", "--set", "finetune.updates=2"]
    train("finetune", "corrected", work, *options, world=2, expected=3)
    assert not work.run("finetune", "no_rvq", 2).root.exists()
    record = RunRecord.read(work.run("finetune", "no_rvq", 1).record)
    assert (record.status, record.world_size) == ("finished", 2)
