"""A run killed with SIGKILL at any moment and started again meets the uninterrupted one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    assert_rows_close,
    assert_same_run,
    command_in_float64,
    command_keeping_checkpoints,
    command_killed,
    command_killed_after_a_checkpoint,
    copy,
    finish,
    patience,
    rows,
    spec,
    start,
    start_ranks,
    train,
    weights,
)

from reproduce.records import RunRecord, Stage, WorkFolder
from reproduce.training.checkpoint import checkpoint_updates

KILLS = ("change", "change", "time", "change", "time", "change")


def killed_again_and_again(
    stage: Stage, protocol: str, work: WorkFolder, options: Sequence[str], seconds: float, seed: int
) -> int:
    """Start, kill, start: at a random time, or before a random change of a file."""
    log, rng = work.root / f"{stage}.log", np.random.default_rng(seed)
    arguments = [stage, spec(protocol, work), "--work", str(work.root), *options]
    for number, how in enumerate(KILLS):
        if how == "change":
            process = start(command_killed, arguments, int(rng.integers(1, 30)), log=log)
            process.join(60)
        else:
            process = start(command_keeping_checkpoints, arguments, log=log)
            time.sleep(seconds * rng.uniform(0.2, 0.6))
            process.kill()
            process.join(60)
        assert process.exitcode in (0, -9), log.read_text()
        if process.exitcode == 0:
            return number
    process = start(command_keeping_checkpoints, arguments, log=log)
    finish([process], log)
    return len(KILLS)


@pytest.mark.parametrize(
    ("stage", "protocol", "arms"),
    [
        ("pretrain", "corrected", ["icsl_8cb"]),
        ("finetune", "as-written", ["no_rvq", "rvq_1", "rvq_4"]),
        ("finetune", "as-run", ["no_rvq", "rvq_1", "rvq_4"]),
        ("finetune", "corrected", ["rvq_2"]),
    ],
    ids=["pretraining", "bank", "bank in train mode", "trained encoder"],
)
def test_killed_run_meets_the_uninterrupted_one(
    base: WorkFolder, tmp_path: Path, stage: Stage, protocol: str, arms: list[str]
) -> None:
    options = [word for arm in arms for word in ("--arm", arm)]
    whole, broken = copy(base, tmp_path / "whole"), copy(base, tmp_path / "broken")
    began = time.monotonic()
    train(stage, protocol, whole, *options, target=command_keeping_checkpoints)
    seconds = time.monotonic() - began
    kills = killed_again_and_again(stage, protocol, broken, options, seconds, seed=3)
    assert kills >= 2
    for arm in arms:
        assert_same_run(broken.run(stage, arm, 1), whole.run(stage, arm, 1))


@pytest.mark.parametrize("protocol", ["as-written", "as-run"])
def test_killed_between_the_checkpoints_of_a_bank(
    base: WorkFolder, tmp_path: Path, protocol: str
) -> None:
    """All arms go on together from the newest update that each has a checkpoint of."""
    arms = ["no_rvq", "rvq_1", "rvq_4"]
    options = [word for arm in arms for word in ("--arm", arm)]
    whole, broken = copy(base, tmp_path / "whole"), copy(base, tmp_path / "broken")
    train("finetune", protocol, whole, *options, target=command_keeping_checkpoints)

    log, runs = broken.root / "kill.log", [broken.run("finetune", arm, 1) for arm in arms]
    arguments = ["finetune", spec(protocol, broken), "--work", str(broken.root), *options]
    process = start(command_killed_after_a_checkpoint, arguments, arms[1], 6, log=log)
    process.join(60)
    assert process.exitcode == -9, log.read_text()
    newest = [checkpoint_updates(run.checkpoints)[0] for run in runs]
    assert newest == [6, 6, 4]

    finish([start(command_keeping_checkpoints, arguments, log=log)], log)
    for run in runs:
        assert RunRecord.read(run.record).bank == arms
        assert_same_run(run, whole.run("finetune", run.arm, 1))


@pytest.mark.parametrize(
    ("stage", "protocol", "arms", "worlds"),
    [
        ("pretrain", "corrected", ["icsl_2cb"], (1, 2)),
        ("finetune", "as-written", ["no_rvq", "rvq_1", "rvq_4"], (1, 2)),
        ("finetune", "corrected", ["rvq_2"], (2, 1)),
    ],
    ids=["pretraining", "bank", "trained encoder"],
)
def test_stopped_and_gone_on_with_by_another_number_of_processes(
    base: WorkFolder,
    tmp_path: Path,
    stage: Stage,
    protocol: str,
    arms: list[str],
    worlds: tuple[int, int],
) -> None:
    options = [word for arm in arms for word in ("--arm", arm)]
    whole, stopped = copy(base, tmp_path / "whole"), copy(base, tmp_path / "stopped")
    train(stage, protocol, whole, *options, target=command_in_float64)
    runs, log = [stopped.run(stage, arm, 1) for arm in arms], stopped.root / "first.log"
    arguments = [stage, spec(protocol, stopped), "--work", str(stopped.root), *options]
    processes = start_ranks(worlds[0], command_in_float64, arguments, log=log)
    with patience() as wait:
        while not (runs[-1].metrics.exists() and rows(runs[-1])):
            wait()
    for process in processes:
        process.terminate()
    finish(processes, log, 143)
    updates = {RunRecord.read(run.record).updates for run in runs}
    assert len(updates) == 1
    assert 0 < updates.pop() < 10
    for run in runs:
        record = RunRecord.read(run.record)
        assert (record.status, record.world_size) == ("interrupted", worlds[0])
        assert record.reason == f"SIGTERM after update {record.updates}"

    train(stage, protocol, stopped, *options, world=worlds[1], target=command_in_float64)
    for run in runs:
        alone = whole.run(stage, run.arm, 1)
        expected = weights(alone)
        for name, weight in weights(run).items():
            difference = (weight.double() - expected[name].double()).abs().max()
            assert float(difference) < 1e-9, name
        assert_rows_close(rows(run), rows(alone), 1e-8)
        assert RunRecord.read(run.record).world_size == worlds[1]
