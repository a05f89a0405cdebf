"""Several workers over one work folder: all is done, once, whoever dies, as if one had done it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    command,
    command_killed_after_a_checkpoint,
    patience,
    rows,
    same,
    spec,
    start,
    tiny_recipe,
    train,
    weights,
)

from reproduce.errors import FailedRunsError, InterruptedRun
from reproduce.grid.lock import STARTED, WORKER
from reproduce.grid.status import grid_runs
from reproduce.grid.workers import Worker, watch
from reproduce.records import RunFolder, RunRecord, WorkFolder

ARMS = ["icsl_2cb", "no_icsl_2cb"]


@pytest.fixture
def work(base: WorkFolder, tmp_path: Path) -> WorkFolder:
    """The same data, no runs."""
    (tmp_path / "data").symlink_to(base.data)
    (tmp_path / "size.yaml").symlink_to(base.root / "size.yaml")
    return WorkFolder(tmp_path)


class Forked:
    """A worker of the tests' server of processes, which starts in no time."""

    def __init__(self, name: str, process: BaseProcess, log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def poll(self) -> int | None:
        return self.process.exitcode

    def stop(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)


class Forking:
    def __init__(self, work: WorkFolder, *options: str, target: Any = command, more: Any = None):
        arms = [f"--arm={arm}" for arm in ARMS]
        self.arguments = ["pretrain", spec("corrected", work), "--work", str(work.root), *arms]
        self.arguments += options
        self.work, self.target, self.more = work, target, more
        self.started, self.all = repr(time.time()), list[Forked]()

    def start(self, count: int) -> list[Forked]:
        return [self._new() for _ in range(count)]

    def again(self, dead: Worker) -> Forked:
        return self._new()

    def _new(self) -> Forked:
        number = len(self.all) + 1
        name, more = str(number), self.more(number) if self.more else ()
        log = self.work.root / f"worker-{name}.log"
        env = {WORKER: name, STARTED: self.started}
        process = start(self.target, self.arguments, *more, log=log, env=env)
        self.all.append(Forked(name, process, log))
        return self.all[-1]


def runs_of(work: WorkFolder, *sets: str) -> list[tuple[RunFolder, int]]:
    return grid_runs(tiny_recipe("corrected", work, *sets), work, ["pretrain"], ARMS)


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def wait_for_rows(run: RunFolder, count: int = 2) -> None:
    with patience() as wait:
        while not (run.metrics.exists() and len(rows(run)) > count):
            wait()


def test_a_killed_worker_changes_nothing(base: WorkFolder, work: WorkFolder) -> None:
    """Both runs end as one process alone makes them, to the last bit."""
    alone = WorkFolder(work.root / "alone")
    alone.root.mkdir()
    (alone.root / "data").symlink_to(base.data)
    (alone.root / "size.yaml").symlink_to(base.root / "size.yaml")
    fleet, runs = Forking(work, target=command_killed_after_a_checkpoint), runs_of(work)
    fleet.more = lambda number: ("icsl_2cb", 6)  # who goes on begins after that update
    watch(fleet, 2, runs)
    codes = [worker.poll() for worker in fleet.all]
    assert sorted(code or 0 for code in codes) == [-signal.SIGKILL, 0, 0]
    train("pretrain", "corrected", alone, *(f"--arm={arm}" for arm in ARMS))
    for run, _ in runs:
        other = alone.run("pretrain", run.arm, 1)
        assert RunRecord.read(run.record).status == "finished"
        clocks = "wall_seconds"
        assert rows(run, clocks) == rows(other, clocks)
        expected = weights(other)
        assert weights(run).keys() == expected.keys()
        assert all(same(weights(run)[name], expected[name]) for name in expected)


def test_a_run_that_kills_whoever_takes_it_has_failed(work: WorkFolder) -> None:
    """The second goes on from the checkpoint after which the first died, and dies later."""
    fleet = Forking(
        work,
        target=command_killed_after_a_checkpoint,
        more=lambda number: ("icsl_2cb", 2 + 2 * number),
    )
    with pytest.raises(FailedRunsError, match="1 of the runs failed: pretrain/icsl_2cb") as end:
        watch(fleet, 1, runs_of(work))
    assert "2 processes died while training it" in end.value.found
    assert RunRecord.read(work.run("pretrain", "no_icsl_2cb", 1).record).status == "finished"
    assert [worker.poll() for worker in fleet.all] == [-9, -9, 1]


def test_all_workers_stop_after_a_checkpoint(work: WorkFolder) -> None:
    sets = ["pretrain.updates=100000", "pretrain.log_every=1"]
    fleet, runs = Forking(work, *(f"--set={item}" for item in sets)), runs_of(work, *sets)

    def stop() -> None:
        for run, _ in runs:
            wait_for_rows(run)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = meanwhile(stop)
    with pytest.raises(InterruptedRun, match="stopped; 0 of 2 finished, 2 interrupted") as end:
        watch(fleet, 2, runs)
    thread.join()
    assert end.value.exit_code == 143
    assert [worker.poll() for worker in fleet.all] == [143, 143]
    for run, _ in runs:
        assert RunRecord.read(run.record).reason.startswith("SIGTERM after update ")


def w2vrep(work: WorkFolder, *options: str) -> tuple[int, str]:
    arguments = ["pretrain", spec("corrected", work), "--work", str(work.root), *options]
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-m", "reproduce", *arguments], env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command(work: WorkFolder) -> None:
    """A worker of two processes."""
    code, told = w2vrep(work, "--set", "compute.processes=2", f"--arm={ARMS[0]}")
    assert code == 0, told
    run = work.run("pretrain", ARMS[0], 1)
    record = RunRecord.read(run.record)
    assert (record.status, record.world_size, record.updates) == ("finished", 2, 10)
    assert f"{run.name}: finished 10/10, train " in told
    (log,) = work.logs.glob("*-pretrain-*.1.log")
    assert log.read_text().count(f"{run.name}: finished") == 1
    assert f"pretrain: {work.root / 'pretrain'}" in told
    assert "processes" not in str(record.settings)


def test_the_command_says_what_its_workers_say(work: WorkFolder) -> None:
    code, told = w2vrep(work, "--jobs", "gpus", "--device", "cpu")
    assert (code, told) == (2, "w2vrep: --jobs gpus: no GPU here\n  give --jobs N --device cpu\n")
    (work.root / "data").unlink()
    code, told = w2vrep(work, "--jobs", "2")
    assert code == 3
    assert "w2vrep prepare" in told
    assert not work.logs.exists()
