"""Jobs of a cluster, as far as no scheduler is needed; tests/slurm has one."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from reproduce.errors import UsageError
from reproduce.grid import slurm as module
from reproduce.grid.lock import STARTED, WORKER
from reproduce.grid.slurm import SlurmFleet, Task
from reproduce.grid.workers import KILLED
from reproduce.recipe import load_recipe

SETS = [
    "cluster.slurm_partition=long",
    "cluster.timeout_min=30",
    "cluster.slurm_signal_delay_s=60",
    "cluster.slurm_additional_parameters={mail-type: FAIL}",
    "cluster.slurm_setup=[module load cuda]",
]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note what they are asked: sbatch takes job 77, squeue tells a file."""
    programs = {
        "sbatch": f'cp "$1" {tmp_path}/script; echo Submitted batch job 77',
        "srun": "exit 1",
        "squeue": f"cat {tmp_path}/queue",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
        "scontrol": f'echo "$@" >> {tmp_path}/controlled',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "QUEUE_SECONDS", 0.0)
    return tmp_path


def fleet(folder: Path, *sets: str) -> SlurmFleet:
    recipe = load_recipe("smoke", [*SETS, *sets])
    return SlurmFleet(["true"], folder / "logs", "pretrain", recipe)


def asked(cluster: Path) -> set[str]:
    return set((cluster / "script").read_text().splitlines())


def test_an_array_of_jobs(cluster: Path) -> None:
    workers = fleet(cluster, "compute.processes=4", "cluster.nodes=2").start(3)
    assert [worker.name for worker in workers] == ["77_0", "77_1", "77_2"]
    assert asked(cluster) >= {
        "#SBATCH --job-name=w2vrep-pretrain",
        "#SBATCH --array=0-2%3",
        "#SBATCH --partition=long",
        "#SBATCH --time=30",
        "#SBATCH --signal=USR1@60",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --requeue",
        "export SUBMITIT_PREEMPT_SIGNAL=USR1",
        "export SRUN_CPUS_PER_TASK=4",
        "module load cuda",
    }
    assert not any("--mem" in line or "--account" in line for line in asked(cluster))
    task = pickle.loads(workers[0]._job.paths.submitted_pickle.read_bytes()).function
    assert (task.command, set(task.env)) == (["true"], {STARTED, "OMP_NUM_THREADS"})
    fleet(cluster, "compute.device=cpu").start(1)
    assert not any(
        line.startswith(("#SBATCH --gpus", "#SBATCH --array")) for line in asked(cluster)
    )


def test_how_jobs_do(cluster: Path) -> None:
    first, second = fleet(cluster).start(2)
    (cluster / "queue").write_text("76\n77_0\n77_1\n")
    assert (first.poll(), second.poll()) == (None, None)
    (cluster / "queue").write_text("76\n77_1\n")
    assert (first.poll(), second.poll()) == (KILLED, None)
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert second.poll() is None  # nobody knows
    (cluster / "queue").write_text("")
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\n")
    second._job.paths.result_pickle.write_bytes(pickle.dumps(("success", 4)))
    assert second.poll() == 4
    second._job.paths.result_pickle.write_bytes(b"no pickle")
    assert second.poll() == 1


def test_a_job_may_save_before_it_is_cancelled(cluster: Path) -> None:
    (worker,) = fleet(cluster).start(1)
    worker.stop(signal.SIGINT)
    asked = ["--state=PENDING 77", "--signal=INT 77"]
    assert (cluster / "cancelled").read_text().splitlines() == asked
    worker.stop(signal.SIGINT)
    assert (cluster / "cancelled").read_text().splitlines() == [*asked, "77"]


def test_what_is_missing_is_said(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho no such partition: long >&2\nexit 1\n")
    with pytest.raises(UsageError, match=r"the cluster takes no job: .*no such partition: long"):
        fleet(cluster).start(2)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(cluster / "nothing"))
        with pytest.raises(UsageError, match="no sbatch here"):
            fleet(cluster)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(UsageError, match=r"(?s)isn't installed.*pip install submitit"):
            fleet(cluster)


# ------------------------------------------------------------------------------------ inside a job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    before = dict(os.environ)  # a task of several exports its rank
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "9",
        "SLURM_NTASKS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def python(tmp_path: Path, code: str) -> list[str]:
    """A command that says when it begins, and ends with 7 when it is asked to stop."""
    begin = (
        "import os, pathlib, signal, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
    )
    return [sys.executable, "-I", "-S", "-c", begin + code]


def when_begun(tmp_path: Path, number: int) -> None:
    """Send this process a signal."""

    def send() -> None:
        last = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < last:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


def test_a_task_is_its_command(tmp_path: Path, job: Any) -> None:
    job.setenv("SLURM_NTASKS", "2")
    job.setenv("SLURM_JOB_NUM_NODES", "2")
    job.setenv("SLURM_PROCID", "1")
    job.setenv("SLURM_JOB_NODELIST", "gpu[3-4]")
    code = (
        f"names = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'X', {WORKER!r}]\n"
        f"told = pathlib.Path({str(tmp_path / 'told')!r})\n"
        "told.write_text(str([os.environ[n] for n in names]))\n"
        "sys.exit(3)\n"
    )
    assert Task(python(tmp_path, code), {"X": "x"})() == 3
    assert (tmp_path / "told").read_text() == str(["1", "2", "0", "gpu3", "x", "9"])


@pytest.mark.parametrize(
    ("number", "state", "again"),
    [
        (signal.SIGINT, "RUNNING", False),
        (signal.SIGTERM, "RUNNING", True),  # preempted
        (signal.SIGTERM, "COMPLETING", False),  # cancelled
    ],
)
def test_a_task_passes_on_that_it_shall_end(
    tmp_path: Path, job: Any, cluster: Path, number: int, state: str, again: bool
) -> None:
    (cluster / "queue").write_text(f"{state}\n")
    when_begun(tmp_path, number)
    assert Task(python(tmp_path, "time.sleep(60)"), {})() == 7
    asked = cluster / "controlled"
    assert asked.exists() == again
    assert not again or asked.read_text() == "requeue 9\n"


def test_a_task_stops_in_order_before_it_is_queued_again(tmp_path: Path, job: Any) -> None:
    """The handler of submitit waits for the command, whose end is still there to be read."""
    task = Task(python(tmp_path, "time.sleep(60)"), {"X": "x"})
    found: list[Any] = []

    def warned(number: int, frame: FrameType | None) -> None:
        began = time.monotonic()
        found.extend([task.checkpoint().function, time.monotonic() - began])

    signal.signal(signal.SIGUSR1, warned)
    when_begun(tmp_path, signal.SIGUSR1)
    assert task() == 7
    again, seconds = found
    assert (again.command, again.env, again._child) == (task.command, {"X": "x"}, None)
    assert seconds < 30
    assert pickle.loads(pickle.dumps(again)).command == task.command
