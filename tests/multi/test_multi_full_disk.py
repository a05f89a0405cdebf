"""A disk that is full at any moment of training: one message, and nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import (
    assert_same_run,
    command_keeping_checkpoints,
    command_on_a_full_disk,
    copy,
    finish,
    spec,
    start,
    train,
)

from reproduce.records import Stage, WorkFolder


@pytest.mark.parametrize(
    ("stage", "protocol", "arms", "moments"),
    [
        (
            "pretrain",
            "corrected",
            ["icsl_8cb"],
            [("run.json", 1), (".update-", 1), (".update-", 5), ("codes.npz", 1), ("README", 1)],
        ),
        (  # of the third checkpoints one is there
            "finetune",
            "as-written",
            ["no_rvq", "rvq_1"],
            [("partial", 1), (".update-", 10), ("hypotheses.csv", 2)],
        ),
    ],
    ids=["pretraining", "bank"],
)
def test_a_full_disk_loses_nothing(
    base: WorkFolder,
    tmp_path: Path,
    stage: Stage,
    protocol: str,
    arms: list[str],
    moments: list[tuple[str, int]],
) -> None:
    """Full at some moment, going on when there is room again, full at a later one."""
    options = [word for arm in arms for word in ("--arm", arm)]
    whole, broken = copy(base, tmp_path / "whole"), copy(base, tmp_path / "broken")
    train(stage, protocol, whole, *options, target=command_keeping_checkpoints)
    log = broken.root / "full.log"
    arguments = [stage, spec(protocol, broken), "--work", str(broken.root), *options]
    runs = [broken.run(stage, arm, 1) for arm in arms]
    for name, call in moments:
        log.unlink(missing_ok=True)
        process = start(command_on_a_full_disk, arguments, name, call, log=log)
        process.join(60)
        assert process.exitcode == 3, log.read_text()
        said = log.read_text()
        assert "can't be written: No space left on device\n  make room there" in said
        assert "Traceback" not in said
        assert str(broken.root) in said
        left = [path.name for path in broken.root.rglob("*")]
        assert [path for path in left if path.endswith((".tmp", ".partial"))] == []
    finish([start(command_keeping_checkpoints, arguments, log=log)], log)
    for run in runs:
        assert_same_run(run, whole.run(stage, run.arm, 1))
