"""A run killed with SIGKILL at any moment and started again meets the uninterrupted one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    command_in_float64,
    command_keeping_checkpoints,
    command_killed,
    command_killed_after_a_checkpoint,
    finish,
    flat,
    patience,
    rows,
    same,
    spec,
    start,
    train,
    weights,
)

from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder
from reproduce.training.checkpoint import checkpoint_updates, load_checkpoint

KILLS = ("change", "change", "time", "change", "time", "change")


def copy(base: WorkFolder, folder: Path) -> WorkFolder:
    shutil.copytree(base.root, folder)
    return WorkFolder(folder)


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


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Rows, weights, optimizer, codebooks and hypotheses, to the last bit."""
    assert rows(found, "wall_seconds") == rows(expected, "wall_seconds")
    walls = [float(row["wall_seconds"]) for row in rows(found)]
    assert walls == sorted(walls)
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if not same(a[name], b[name])] == []

    update = RunRecord.read(expected.record).updates
    assert checkpoint_updates(found.checkpoints)[0] == update
    state, wanted = (flat(load_checkpoint(run.checkpoints, update)) for run in (found, expected))
    assert state.keys() == wanted.keys()
    differ = [name for name in state if not same(state[name], wanted[name])]
    # clocks; the size has the seconds' digits
    assert set(differ) <= {"/wall_seconds", "/validation_seconds", "/metrics_size"}

    ours, theirs = RunRecord.read(found.record), RunRecord.read(expected.record)
    assert (ours.status, ours.outcome, ours.final) == ("finished", theirs.outcome, theirs.final)
    for name in ("codes.npz", "hypotheses.csv"):
        if (expected.root / name).exists():
            assert (found.root / name).read_bytes() == (expected.root / name).read_bytes()
    left = [p.name for p in found.root.rglob("*.tmp")]
    assert left == []


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


def test_stopped_under_one_process_goes_on_under_two(base: WorkFolder, tmp_path: Path) -> None:
    whole, stopped = copy(base, tmp_path / "whole"), copy(base, tmp_path / "stopped")
    arm = "icsl_2cb"
    train("pretrain", "corrected", whole, "--arm", arm, target=command_in_float64)
    run, log = stopped.run("pretrain", arm, 1), stopped.root / "first.log"
    arguments = ["pretrain", spec("corrected", stopped), "--work", str(stopped.root), "--arm", arm]
    process = start(command_in_float64, arguments, log=log)
    with patience() as wait:
        while not (run.metrics.exists() and rows(run)):
            wait()
    process.terminate()
    finish([process], log, 143)
    record = RunRecord.read(run.record)
    assert record.status == "interrupted"
    assert 0 < record.updates < 10
    assert record.reason == f"SIGTERM after update {record.updates}"

    train("pretrain", "corrected", stopped, "--arm", arm, world=2, target=command_in_float64)
    expected = weights(whole.run("pretrain", arm, 1))
    for name, weight in weights(run).items():
        assert float((weight - expected[name]).abs().max()) < 1e-9, name
    positions = [
        [(r["update"], r["split"]) for r in rows(w.run("pretrain", arm, 1))]
        for w in (stopped, whole)
    ]
    assert positions[0] == positions[1]
    assert RunRecord.read(run.record).world_size == 2
