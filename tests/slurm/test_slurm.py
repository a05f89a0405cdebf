"""A grid as an array of jobs on a real scheduler, with a killed job and a time limit."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from one_node import one_node

from reproduce.grid.lock import Holder, look
from reproduce.grid.slurm import SlurmFleet
from reproduce.recipe import load_recipe
from reproduce.records import RunFolder, WorkFolder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(5400)]
LONG, KILLED, SHORT = ARMS = ["icsl_2cb", "no_icsl_2cb", "icsl_4cb"]
LIMIT_MINUTES, WARNING_SECONDS = 30, 60
# A limit set two minutes ahead, in whole minutes, is warned of within two.
LONG_SECONDS, KILLED_SECONDS = 150, 20


def w2vrep(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "reproduce", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    code = process.wait()
    assert code == 0, log.read_text()
    return log.read_text()


def rows(run: RunFolder) -> list[dict[str, str]]:
    """metrics.csv as text, but for the clock."""
    if not run.metrics.exists():
        return []
    with open(run.metrics, encoding="utf-8", newline="") as file:
        return [{k: v for k, v in r.items() if k != "wall_seconds"} for r in csv.DictReader(file)]


def in_training(work: WorkFolder, arm: str, grid: subprocess.Popen[bytes], log: Path) -> Holder:
    """Who trains an arm, once somebody does."""
    run = work.run("pretrain", arm, 1)
    while len(rows(run)) < 2:
        assert grid.poll() is None, log.read_text()
        time.sleep(0.05)
    return look(run.lock)


def kill(holder: Holder) -> None:
    """Kill a command and the task of the job that it is in, as the system does without memory.

    scancel would ask first, whatever signal it is given.
    """
    status = Path(f"/proc/{holder.pid}/status").read_text()
    task = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
    for pid in (int(task), holder.pid):
        os.kill(pid, signal.SIGKILL)


def minutes_run(job: str) -> float:
    """For how long a job runs."""
    told = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i %S"],
        capture_output=True,
        text=True,
        check=True,
    )
    begun = dict(line.split() for line in told.stdout.splitlines())[job]
    return (time.time() - time.mktime(time.strptime(begun, "%Y-%m-%dT%H:%M:%S"))) / 60


def limit(job: str, minutes: int) -> None:
    """Give a job another time limit, as soon as SLURM takes it."""
    update = ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"]
    for _ in range(120):
        if subprocess.run(update, check=False).returncode == 0:
            return
        time.sleep(0.5)
    raise AssertionError(f"SLURM doesn't change the time limit of {job}")


def test_a_grid_survives_a_killed_job_and_a_time_limit(tmp_path: Path) -> None:
    """All runs end equal, bit for bit, to those trained without SLURM."""
    alone, work = WorkFolder(tmp_path / "alone"), WorkFolder(tmp_path / "slurm")
    log = tmp_path / "log"
    arms = [f"--arm={arm}" for arm in ARMS] + ["--seed=1"]
    finish(w2vrep(log, "prepare", "smoke", "--work", str(alone.root), "--set=data.jobs=1"), log)
    work.root.mkdir()
    (work.root / "data").symlink_to(alone.data)

    probe = ["--work", str(alone.root), "--seed=2", f"--arm={LONG}", "--device=cpu"]
    finish(w2vrep(log, "pretrain", "smoke", *probe), log)
    record = json.loads(alone.run("pretrain", LONG, 2).record.read_text())
    pace = record["wall_seconds"] / record["updates"]
    sets = [
        f"--set=pretrain.arms.{arm}.updates={max(12, math.ceil(seconds / pace))}"
        for arm, seconds in ((LONG, LONG_SECONDS), (KILLED, KILLED_SECONDS))
    ]
    train = ["pretrain", "smoke", *sets, *arms, "--device=cpu"]
    finish(w2vrep(log, *train, "--work", str(alone.root)), log)

    with one_node():
        job = [
            f"--set=cluster.timeout_min={LIMIT_MINUTES}",
            f"--set=cluster.slurm_signal_delay_s={WARNING_SECONDS}",
            "--set=cluster.cpus_per_task=1",
        ]
        grid = w2vrep(log, *train, *job, "--work", str(work.root), "--cluster", "slurm")
        kill(killed := in_training(work, KILLED, grid, log))
        limited = in_training(work, LONG, grid, log).worker
        limit(limited, math.ceil(minutes_run(limited)) + 2)
        logs = work.logs / "slurm"
        while "Requeued job" not in (logs / f"{limited}_0_log.out").read_text():
            assert grid.poll() is None, log.read_text()
            time.sleep(0.5)
        limit(limited, LIMIT_MINUTES)
        told = finish(grid, log)
        queued = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True)
        assert queued.stdout == ""
    assert f"worker {killed.worker} was killed" in told
    stopped = (logs / f"{limited}_0_log.out").read_text()
    assert stopped.index("Caught signal SIGUSR1") < stopped.index("stopped after update")
    assert any("died; taken up again" in path.read_text() for path in logs.glob("*.out"))

    for arm in ARMS:
        run, other = work.run("pretrain", arm, 1), alone.run("pretrain", arm, 1)
        record = json.loads(run.record.read_text())
        assert (record["status"], run.checkpoints.exists()) == ("finished", False)
        assert record["recipe_sha256"] == json.loads(other.record.read_text())["recipe_sha256"]
        assert rows(run) == rows(other)
        model = "model.safetensors"
        assert (run.model / model).read_bytes() == (other.model / model).read_bytes()


def test_a_preempted_job_comes_back_and_a_cancelled_one_does_not(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = (
        f"echo >> {begun}; trap 'exit 143' TERM; trap 'exit 130' INT; while :; do sleep 0.2; done"
    )

    def until(happened: Callable[[], bool]) -> None:
        last = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < last
            time.sleep(0.2)

    recipe = load_recipe("smoke", ["compute.device=cpu", "cluster.cpus_per_task=1"])
    with one_node():
        fleet = SlurmFleet(["sh", "-c", code], tmp_path / "logs", "pretrain", recipe)
        preempted, stopped = fleet.start(2)
        until(lambda: begun.exists() and begun.read_text().count("\n") == 2)
        subprocess.run(["scancel", "--signal=TERM", preempted.name], check=True)  # with grace time
        until(lambda: begun.read_text().count("\n") == 3)
        assert (preempted.poll(), stopped.poll()) == (None, None)
        subprocess.run(["scancel", preempted.name], check=True)
        stopped.stop(signal.SIGTERM)
        until(lambda: stopped.poll() == 130 and preempted.poll() == 143)
        assert begun.read_text().count("\n") == 3
