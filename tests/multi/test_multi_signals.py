"""SIGINT and SIGTERM: stop after this update, on all ranks at the same one; twice: at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    command,
    finish,
    patience,
    rows,
    spec,
    start,
    start_ranks,
    train,
)

from reproduce.records import RunFolder, RunRecord, WorkFolder
from reproduce.training.checkpoint import checkpoint_updates, load_checkpoint

ARM = "icsl_2cb"
ENDLESS = ["--set", "pretrain.updates=100000", "--set", "pretrain.log_every=1"]


@pytest.fixture
def work(base: WorkFolder, tmp_path: Path) -> WorkFolder:
    """The same data, no runs."""
    (tmp_path / "data").symlink_to(base.data)
    (tmp_path / "size.yaml").symlink_to(base.root / "size.yaml")
    return WorkFolder(tmp_path)


def arguments(work: WorkFolder, *options: str) -> list[str]:
    return ["pretrain", spec("corrected", work), "--work", str(work.root), "--arm", ARM, *options]


def wait_for_rows(run: RunFolder, process: Any) -> None:
    with patience() as wait:
        while not (run.metrics.exists() and len(rows(run)) > 2):
            assert process.exitcode is None if hasattr(process, "exitcode") else not process.poll()
            wait()


def assert_stopped(run: RunFolder, name: str) -> int:
    """Interrupted, with a checkpoint of that update, a row of it, and the reason."""
    record = RunRecord.read(run.record)
    assert record.status == "interrupted"
    assert record.reason == f"{name} after update {record.updates}"
    assert record.ended is not None
    assert checkpoint_updates(run.checkpoints)[0] == record.updates
    state = load_checkpoint(run.checkpoints, record.updates)
    assert state["metrics_size"] == run.metrics.stat().st_size
    trained = [int(row["update"]) for row in rows(run) if row["split"] == "train"]
    assert trained == list(range(1, record.updates + 1))
    return record.updates


@pytest.mark.parametrize("to_workers", [False, True], ids=["launcher", "all at once"])
def test_torchrun_stops_all_ranks_at_the_same_update(work: WorkFolder, to_workers: bool) -> None:
    """SIGTERM to the launcher, which passes it on; and to all at once, as schedulers send it: each
    worker then gets it twice."""
    run, log = work.run("pretrain", ARM, 1), work.root / "torchrun.log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    called = ["--nproc-per-node", "2", "-m", "reproduce", "--debug", *arguments(work, *ENDLESS)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*launcher, *called],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for_rows(run, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        for worker in children if to_workers else []:
            os.kill(int(worker), signal.SIGTERM)
        process.terminate()
        assert process.wait(60) != 0
    finally:
        process.kill()
    update = assert_stopped(run, "SIGTERM")
    stopped = re.findall(r"InterruptedRun.*stopped after update (\d+)", log.read_text())
    assert stopped == [str(update)] * 2, log.read_text()
    assert RunRecord.read(run.record).world_size == 2


def test_a_signal_to_one_rank_stops_all(work: WorkFolder) -> None:
    run, log = work.run("pretrain", ARM, 1), work.root / "ranks.log"
    processes = start_ranks(2, command, arguments(work, *ENDLESS), log=log)
    wait_for_rows(run, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    finish(processes, log, 143)
    update = assert_stopped(run, "SIGTERM")
    for each in range(2):
        text = log.with_suffix(f".{each}").read_text()
        assert re.findall(r"InterruptedRun.*stopped after update (\d+)", text) == [str(update)]


def test_the_warning_of_a_scheduler_asks_the_same(work: WorkFolder) -> None:
    """SIGUSR1, and the SIGTERM that follows when the time is up: no second request."""
    run, log = work.run("pretrain", ARM, 1), work.root / "one.log"
    process = start(command, arguments(work, *ENDLESS), log=log)
    wait_for_rows(run, process)
    os.kill(process.pid or 0, signal.SIGUSR1)
    os.kill(process.pid or 0, signal.SIGUSR1)
    os.kill(process.pid or 0, signal.SIGTERM)
    finish([process], log, 143)
    assert_stopped(run, "SIGTERM")


def test_sigint_saves_and_says_how_to_go_on(work: WorkFolder) -> None:
    run, log = work.run("pretrain", ARM, 1), work.root / "one.log"
    process = start(command, arguments(work, *ENDLESS), log=log)
    wait_for_rows(run, process)
    os.kill(process.pid or 0, signal.SIGINT)
    finish([process], log, 130)
    update = assert_stopped(run, "SIGINT")
    told = log.read_text()
    assert "stopping after this update; once more quits at once" in told
    assert f"stopped after update {update} of 100000; checkpoint saved" in told
    assert "run the same command again to go on from there" in told


def test_a_second_signal_quits_at_once(work: WorkFolder) -> None:
    """In the middle of an update that would take minutes: no checkpoint is waited for."""
    run, log = work.run("pretrain", ARM, 1), work.root / "one.log"
    slow = ["--set", "pretrain.accumulation=5000"]
    process = start(command, arguments(work, *slow), log=log)
    with patience() as wait:
        while not run.metrics.exists():
            wait()
    time.sleep(0.3)
    os.kill(process.pid or 0, signal.SIGTERM)
    with patience() as wait:
        while "once more quits at once" not in log.read_text():
            wait()
    began = time.monotonic()
    os.kill(process.pid or 0, signal.SIGINT)
    finish([process], log, 130)
    assert time.monotonic() - began < 5
    assert RunRecord.read(run.record).status == "running"
    assert checkpoint_updates(run.checkpoints) == []


def test_an_error_of_the_main_rank_ends_all_ranks(work: WorkFolder) -> None:
    """Each with the code of that error, instead of waiting for each other."""
    train("pretrain", "corrected", work, "--arm", ARM, "--set", "pretrain.updates=1")
    options = ["--arm", ARM, "--set", "pretrain.updates=2"]
    train("pretrain", "corrected", work, *options, world=2, expected=2)
    train("finetune", "corrected", work, "--arm", "no_rvq", world=2, expected=3)
