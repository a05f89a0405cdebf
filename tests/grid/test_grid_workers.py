"""Workers: where they run, who follows a dead one, what is passed on, how all of it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from reproduce.errors import (
    DataError,
    DivergedError,
    FailedRunsError,
    InterruptedRun,
    UsageError,
)
from reproduce.grid import workers as module
from reproduce.grid.lock import STARTED, WORKER, RunLock, look
from reproduce.grid.status import run_state
from reproduce.grid.workers import KILLED, LocalFleet, LocalWorker, Worker, watch, worker_command
from reproduce.recipe import load_recipe
from reproduce.records import RunFolder, RunRecord, Status, WorkFolder
from reproduce.stages import fleet as fleet_module
from reproduce.stages.fleet import Hands, hands_of, train_by

Act = Callable[["Acted"], int | None]


class Acted:
    """A worker that acts when it is asked how it does."""

    def __init__(self, name: str, act: Act, folder: Path) -> None:
        self.name, self.act, self.log = name, act, folder / f"{name}.log"
        self.log.touch()
        self.signals: list[int] = []
        self.locks: list[RunLock] = []

    def poll(self) -> int | None:
        return self.act(self)

    def stop(self, number: int) -> None:
        self.signals.append(number)


class Acting:
    """A fleet of them; each new one does what is next."""

    def __init__(self, folder: Path, *acts: Act) -> None:
        self.folder, self.acts, self.all = folder, list(acts), list[Acted]()

    def start(self, count: int) -> list[Acted]:
        return [self._new() for _ in range(count)]

    def again(self, dead: Worker) -> Acted:
        return self._new()

    def _new(self) -> Acted:
        self.all.append(Acted(str(len(self.all) + 1), self.acts[len(self.all)], self.folder))
        return self.all[-1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(module, "VIEW_SECONDS", 0.01)


@pytest.fixture
def runs(tmp_path: Path) -> list[tuple[RunFolder, int]]:
    found = [WorkFolder(tmp_path).run("pretrain", arm, 1) for arm in ("first", "last")]
    for run in found:
        run.root.mkdir(parents=True)
    return [(run, 10) for run in found]


def ends(run: RunFolder, status: Status = "finished", **about: str) -> None:
    record = RunRecord(run.arm, run.seed, status=status, updates_planned=10)
    for name, value in about.items():
        setattr(record, name, value)
    record.write(run.record)


def exits(code: int, *finished: RunFolder, said: str = "") -> Act:
    def act(worker: Acted) -> int:
        for run in finished:
            ends(run)
        worker.log.write_text(said)
        return code

    return act


def dies_over(run: RunFolder) -> Act:
    """The lock as somebody leaves it behind who is killed."""

    def act(worker: Acted) -> int:
        os.environ[WORKER] = worker.name
        lock = RunLock(run.lock, 0.0)
        assert lock.take() == "taken"
        os.close(lock._file)
        del os.environ[WORKER]
        return KILLED

    return act


def test_another_follows_who_dies_over_a_run(
    tmp_path: Path, runs: list[tuple[RunFolder, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    (first, _), (last, _) = runs
    fleet = Acting(tmp_path, dies_over(first), exits(0, last), exits(0, first))
    watch(fleet, 2, runs)
    assert [worker.name for worker in fleet.all] == ["1", "2", "3"]
    told = capsys.readouterr().err
    assert "worker 1 was killed (SIGKILL: by hand, by the system, or out of memory)" in told
    assert "worker 3 begins" in told
    assert "pretrain/first/seed-1: finished" in told


def test_nobody_follows_who_died_over_nothing(
    tmp_path: Path, runs: list[tuple[RunFolder, int]]
) -> None:
    """At its start, say: the next one would die too."""
    fleet = Acting(tmp_path, exits(KILLED), exits(1, said="w2vrep: no memory\n"))
    with pytest.raises(FailedRunsError, match="no memory") as end:
        watch(fleet, 2, runs)
    assert (end.value.exit_code, len(fleet.all)) == (1, 2)
    with pytest.raises(FailedRunsError, match=r"2 of the runs are left: .*worker 1 was killed"):
        watch(Acting(tmp_path, exits(KILLED)), 1, runs)
    with pytest.raises(FailedRunsError, match=r"1 of the runs are left: pretrain/last/seed-1\n"):
        watch(Acting(tmp_path, exits(0, runs[0][0])), 1, runs)


def test_another_follows_in_whose_hands_a_run_failed(
    tmp_path: Path, runs: list[tuple[RunFolder, int]]
) -> None:
    (first, _), (last, _) = runs

    def fails(worker: Acted) -> int:
        os.environ[WORKER] = worker.name
        ends(first, "failed", reason="RuntimeError: out of memory")
        lock = RunLock(first.lock, 0.0)
        lock.take()
        lock.release(failed=True)
        assert look(first.lock).worker == worker.name
        del os.environ[WORKER]
        return 1

    fleet = Acting(tmp_path, fails, exits(1, last))
    with pytest.raises(FailedRunsError) as end:
        watch(fleet, 1, runs)
    assert len(fleet.all) == 2
    assert end.value.found == (
        "1 of the runs failed: pretrain/first/seed-1 (RuntimeError: out of memory)"
    )


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UsageError), (3, DataError), (4, DivergedError), (1, FailedRunsError)]
)
def test_what_a_worker_says_at_its_end_is_said(
    tmp_path: Path, runs: list[tuple[RunFolder, int]], code: int, kind: type[Exception]
) -> None:
    said = "something else\nw2vrep: here: not good\n  do this\n"
    fleet = Acting(tmp_path, exits(0, runs[0][0]), exits(code, said=said))
    with pytest.raises(kind) as end:
        watch(fleet, 2, runs)
    assert type(end.value) is kind
    assert str(end.value) == "here: not good\n  do this"
    with pytest.raises(kind, match=r"worker 1 ended without a word\n  see .*1\.log"):
        watch(Acting(tmp_path, exits(code)), 1, runs)


def test_diverged_runs_are_told(tmp_path: Path, runs: list[tuple[RunFolder, int]]) -> None:
    ends(runs[0][0], "failed", outcome="diverged")
    with pytest.raises(DivergedError, match="1 of the runs diverged: pretrain/first/seed-1"):
        watch(Acting(tmp_path, exits(0, runs[1][0])), 1, runs)


def test_signals_are_passed_on_once_each(tmp_path: Path, runs: list[tuple[RunFolder, int]]) -> None:
    """A warning and the SIGTERM that follows are one request; who stops isn't followed."""

    def until_twice(worker: Acted) -> int | None:
        return 143 if len(worker.signals) == 2 else None

    def send() -> None:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    fleet = Acting(tmp_path, until_twice, until_twice)
    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="stopped; 0 of 2 finished, 2 waiting") as end:
        watch(fleet, 2, runs)
    thread.join()
    assert end.value.exit_code == 143
    assert [worker.signals for worker in fleet.all] == [[signal.SIGTERM] * 2] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_is_stopped_alone_leaves_its_run(
    tmp_path: Path, runs: list[tuple[RunFolder, int]]
) -> None:
    ends(runs[0][0], "interrupted")
    with pytest.raises(InterruptedRun, match="left: pretrain/first/seed-1") as end:
        watch(Acting(tmp_path, exits(143, runs[1][0])), 1, runs)
    assert end.value.exit_code == 143


@pytest.mark.parametrize("died", [False, True])
def test_what_another_command_trains_is_waited_for(
    tmp_path: Path, runs: list[tuple[RunFolder, int]], died: bool
) -> None:
    """And taken up if that ends without it."""
    (first, _), (last, _) = runs
    other = RunLock(first.lock, 0.0)
    assert other.take() == "taken"

    def end() -> None:
        time.sleep(0.2)
        if not died:
            ends(first)
        other.release()

    thread = threading.Thread(target=end)
    fleet = Acting(tmp_path, exits(0, last), exits(0, first))
    thread.start()
    watch(fleet, 1, runs)
    thread.join()
    assert len(fleet.all) == 1 + died


# ------------------------------------------------------------------------------------ on this box


def printing(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def wait_for(worker: LocalWorker) -> int:
    last = time.monotonic() + 60
    while (code := worker.poll()) is None:
        assert time.monotonic() < last
        time.sleep(0.01)
    return code


NAMES = ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", WORKER, STARTED]
PRINT_ENV = f"import json, os\nprint(json.dumps([os.environ.get(n) for n in {NAMES}]))\n"


def told(worker: LocalWorker) -> list[list[str | None]]:
    assert wait_for(worker) == 0
    return sorted(json.loads(line) for line in worker.log.read_text().splitlines())


def test_gpus_and_threads_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(module, "cores", lambda: 9)
    fleet = LocalFleet(printing(PRINT_ENV), tmp_path, "pretrain", 3, gpus=["0", "GPU-5"])
    first, second, third = (told(worker)[0] for worker in fleet.start(3))
    me = os.getpid()
    assert first[:5] == ["0", "3", None, None, f"{me}.1"]
    assert second[:5] == ["GPU-5", "3", None, None, f"{me}.2"]
    assert third[:5] == ["0", "3", None, None, f"{me}.3"]
    assert first[5] == third[5]
    assert abs(float(first[5] or 0) - time.time()) < 300
    wide = LocalFleet(printing(PRINT_ENV), tmp_path, "pretrain", 2, 2, gpus=list("0123"))
    _, worker = wide.start(2)
    assert [row[:4] for row in told(worker)] == [["2,3", "2", "0", "2"], ["2,3", "2", "1", "2"]]
    again = wide.again(worker)
    assert told(again)[0][:5] == ["2,3", "2", "0", "2", f"{me}.3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    (worker,) = LocalFleet(printing(PRINT_ENV), tmp_path, "finetune", 1).start(1)
    assert told(worker)[0][:2] == [os.environ.get("CUDA_VISIBLE_DEVICES"), "5"]


def test_a_worker_is_out_of_reach_of_the_terminal(tmp_path: Path) -> None:
    code = "import os\nprint(os.getsid(0) == os.getpid())"
    worker = LocalWorker("1", 0, printing(code), [{}], tmp_path / "deep" / "1.log")
    assert wait_for(worker) == 0
    assert worker.log.read_text() == "True\n"


def test_ranks_end_with_the_first_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for its sums, deaf to what is asked."""
    monkeypatch.setattr(module, "RANK_SECONDS", 0.2)
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "time.sleep(120)\n"
    )
    (worker,) = LocalFleet(printing(code), tmp_path, "pretrain", 1, 2).start(1)
    assert wait_for(worker) == 3


# ------------------------------------------------------------------------------------- who trains


def test_a_worker_is_the_command_of_a_user() -> None:
    command = worker_command("pretrain", ["smoke", "--work=w"], ["icsl_2cb"], [1, 2])
    assert command[1:] == [
        *("-m", "reproduce", "pretrain", "smoke", "--work=w"),
        *("--arm=icsl_2cb", "--seed=1", "--seed=2"),
    ]


def test_who_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe, wide = load_recipe("smoke"), load_recipe("smoke", ["compute.processes=2"])
    assert hands_of(recipe, None, None, []) is None
    assert hands_of(recipe, "1", None, []) is None
    for case in ((recipe, "2", None), (recipe, None, "slurm"), (wide, None, None)):
        hands = hands_of(*case, ["smoke"])
        assert hands is not None
        assert (hands.jobs, hands.cluster, hands.options) == (*case[1:], ["smoke"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hands_of(recipe, None, None, []) is None
    assert hands_of(wide, None, None, []) is None


@pytest.mark.parametrize(
    ("jobs", "processes", "gpus", "expected"),
    [
        ("gpus", 1, 4, 4),
        ("gpus", 2, 5, 2),
        ("3", 1, 2, 3),
        (None, 2, 0, 1),
        ("gpus", 1, 0, "--jobs gpus: no GPU here"),
        ("gpus", 4, 3, "--jobs gpus: 3 GPUs here, and a run needs 4"),
        ("2", 2, 1, "compute.processes: 1 GPUs here, and a run needs 2"),
    ],
)
def test_how_many_workers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jobs: str | None,
    processes: int,
    gpus: int,
    expected: int | str,
) -> None:
    work = WorkFolder(tmp_path)
    work.data.mkdir()
    work.summary.touch()
    seen: list[tuple[LocalFleet, int]] = []
    monkeypatch.setattr(fleet_module, "visible_gpus", lambda: [str(n) for n in range(gpus)])
    monkeypatch.setattr(fleet_module, "watch", lambda fleet, count, _: seen.append((fleet, count)))
    recipe = load_recipe("smoke", [f"compute.processes={processes}"])
    hands = Hands(jobs, None, [])
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            train_by(hands, "pretrain", recipe, work, ["icsl_2cb"], [1])
        return
    train_by(hands, "pretrain", recipe, work, ["icsl_2cb"], [1])
    ((fleet, count),) = seen
    assert (count, fleet.processes, len(fleet.gpus)) == (expected, processes, gpus)


@pytest.mark.parametrize(
    ("sets", "jobs", "cluster", "world", "where"),
    [
        ((), "0", None, None, "--jobs: found '0'"),
        ((), "two", None, None, "--jobs: found 'two'"),
        ((), "-1", None, None, "--jobs: found '-1'"),
        ((), "gpus", "slurm", None, "--jobs: gpus are those of this machine"),
        ((), "2", None, "2", "--jobs: a launcher started this process"),
        ((), None, "slurm", "2", "--cluster: a launcher started this process"),
        (("compute.processes=3",), None, None, "2", "compute.processes: 3 processes a run, and"),
    ],
)
def test_who_can_not_train(
    monkeypatch: pytest.MonkeyPatch,
    sets: Sequence[str],
    jobs: str | None,
    cluster: str | None,
    world: str | None,
    where: str,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError) as end:
        hands_of(load_recipe("smoke", sets), jobs, cluster, [])
    assert str(end.value).startswith(where)


# ---------------------------------------------------------------------------------------- showing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_one_table_in_place(
    tmp_path: Path, runs: list[tuple[RunFolder, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setenv("TERM", "xterm")
    (first, _), (last, _) = runs
    lock = RunLock(first.lock, 0.0, "cuda 3")
    lock.take()
    with module._view() as view:
        view.show([run_state(run, 10) for run, _ in runs])
        view.say("worker 2 was killed [bold]")
        ends(last)
        view.show([run_state(first, 10)] + [run_state(last, 10)] * 9)
    lock.release()
    told = terminal.getvalue()
    assert "\x1b[1A" in told  # goes up and writes over itself
    told = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", told)
    table, killed, rest = told.partition("worker 2 was killed [bold]")
    assert killed
    whole = [line.split() for line in table.replace("\r", "").splitlines()]
    assert ["run", "state", "update"] in [line[:3] for line in whole]
    assert ["pretrain/first/seed-1", "training", "0/10"] in [line[:3] for line in whole]
    assert ["pretrain/last/seed-1", "waiting", "0/10"] in [line[:3] for line in whole]
    few = rest[rest.rindex("run ") :]  # more runs than lines: those that say nothing are left out
    assert "pretrain/first/seed-1" in few
    assert "pretrain/last/seed-1" not in few
    assert "9 of 10 finished, 1 training" in few
