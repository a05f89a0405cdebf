"""Several workers over one work folder: started, watched, told to stop, shown in one view.

A worker is the same command that a user would type, and claims runs by their locks (claiming.py).
It leaves when nothing is left to claim; who dies over a run is followed by another, and a run over
which `lock.DEATHS` of them died has failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from reproduce.data.manifest import cores
from reproduce.errors import (
    DataError,
    DivergedError,
    FailedRunsError,
    InterruptedRun,
    UsageError,
    W2vrepError,
)
from reproduce.grid.lock import STARTED, WORKER, look
from reproduce.grid.status import RunState, run_state, state_line, status_lines, summary_line
from reproduce.records import RunFolder, Stage

POLL_SECONDS = 0.2
"""Between two looks at the workers."""
VIEW_SECONDS = 2.0
"""Between two looks at the runs."""
RANK_SECONDS = 20.0
"""So long may the other processes of a run take to end after one of them failed."""
KILLED = -int(signal.SIGKILL)
"""The code of a worker of whom nothing but its end is known."""

Runs = Sequence[tuple[RunFolder, int]]
"""Runs and their planned updates, see :func:`reproduce.grid.status.grid_runs`."""


class Worker(Protocol):
    """One that trains: a command, or a job of a cluster."""

    @property
    def name(self) -> str:
        """As the locks show it."""

    @property
    def log(self) -> Path:
        """Where its messages go."""

    def poll(self) -> int | None:
        """Its exit code, a signal's number negative; None: it is at work."""

    def stop(self, number: int) -> None:
        """Pass on a signal."""


class Fleet(Protocol):
    """Where workers come from."""

    def start(self, count: int) -> Sequence[Worker]:
        """The first ones."""

    def again(self, dead: Worker) -> Worker:
        """One in the place of another."""


def worker_command(
    stage: Stage, options: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """What a user would type; ``options``: RECIPE and those that all stages have."""
    chosen = [f"--arm={arm}" for arm in arms] + [f"--seed={seed}" for seed in seeds]
    return [sys.executable, "-m", "reproduce", stage, *options, *chosen]


# ------------------------------------------------------------------------------------ on this box


class LocalWorker:
    """A command on this machine, in one process or several ranks.

    Each has a session of its own: Ctrl-C reaches it through its parent alone, once.
    """

    def __init__(
        self,
        name: str,
        slot: int,
        command: Sequence[str],
        envs: Sequence[dict[str, str]],
        log: Path,
    ) -> None:
        self.name, self.slot, self.log = name, slot, log
        self._code, self._since = 0, 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._ranks = [
                subprocess.Popen(
                    command,
                    env=os.environ | env | {WORKER: name},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for env in envs
            ]

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self._ranks]
        if not self._code and (bad := [code for code in codes if code]):
            self._code, self._since = bad[0], time.monotonic()
        if None not in codes:
            return self._code
        if self._code and time.monotonic() - self._since > RANK_SECONDS:
            self.stop(signal.SIGKILL)  # they wait for the sums of one that is gone
        return None

    def stop(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)


class LocalFleet:
    """Workers on this machine.

    Args:
        command: of a worker.
        logs: folder for their messages.
        stage: names the files there.
        count: workers at a time.
        processes: of each.
        gpus: CUDA's names of those to use, dealt out in turn; empty: the CPU.
    """

    def __init__(
        self,
        command: Sequence[str],
        logs: Path,
        stage: Stage,
        count: int,
        processes: int = 1,
        gpus: Sequence[str] = (),
    ) -> None:
        self.command, self.logs, self.stage = list(command), logs, stage
        self.processes, self.gpus = processes, list(gpus)
        self.shared = {STARTED: repr(time.time())}
        if "OMP_NUM_THREADS" not in os.environ:
            self.shared["OMP_NUM_THREADS"] = str(max(1, cores() // (count * processes)))
        self.started = 0

    def start(self, count: int) -> list[LocalWorker]:
        return [self._start(slot) for slot in range(count)]

    def again(self, dead: Worker) -> LocalWorker:
        assert isinstance(dead, LocalWorker)
        return self._start(dead.slot)

    def _start(self, slot: int) -> LocalWorker:
        self.started += 1
        name, env = f"{os.getpid()}.{self.started}", dict(self.shared)
        if self.gpus:
            first = slot * self.processes
            mine = [self.gpus[(first + n) % len(self.gpus)] for n in range(self.processes)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        envs = [env | rank for rank in rank_envs(self.processes)]
        log = self.logs / f"{socket.gethostname()}-{self.stage}-{name}.log"
        return LocalWorker(name, slot, self.command, envs, log)


def rank_envs(world: int) -> list[dict[str, str]]:
    """What torchrun sets, a process; nothing where there is only one."""
    if world == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def visible_gpus() -> list[str]:
    """CUDA's names of the devices that this process sees."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]


# --------------------------------------------------------------------------------------- watching


def watch(fleet: Fleet, count: int, runs: Runs) -> None:
    """Start so many workers and return when all runs are finished, by them or by others.

    SIGINT, SIGTERM and SIGUSR1 are passed on; a second one has the workers quit at once.

    Raises:
        UsageError, DataError: what a worker said who couldn't begin, or lacks something.
        FailedRunsError: some run failed, or is left over since its workers died.
        DivergedError: some run diverged; all others are done.
        InterruptedRun: a signal came, and runs are left.
    """
    workers: list[Worker] = []
    ended: list[tuple[Worker, int]] = []
    useful: set[str] = set()
    abroad: set[str] = set()
    states: list[RunState] = []
    stopping = 0
    with _Requests() as asked, _view() as view:
        try:
            workers += fleet.start(count)
            names = {worker.name for worker in workers}
            view.say(f"{len(runs)} runs, workers: {', '.join(sorted(names))}")
            view.say(f"what they say is in {workers[0].log.parent}")
            while workers or (any(state.held for state in states) and not stopping):
                time.sleep(POLL_SECONDS)
                for _ in range(asked.count - stopping):
                    for worker in workers:
                        worker.stop(asked.number)
                stopping = asked.count
                gone = [(worker, code) for worker in workers if (code := worker.poll()) is not None]
                if not gone and not view.due:
                    continue
                states = [run_state(run, updates) for run, updates in runs]
                view.show(states)
                useful |= {state.holder.worker for state in states}
                free = [s.run.name for s in states if not (s.over or s.held)]
                for worker, code in gone:
                    workers.remove(worker)
                    ended.append((worker, code))
                    if stopping or code not in (1, *range(-64, 0)):
                        continue
                    view.say(f"worker {worker.name} {_end(code)}; its log: {worker.log}")
                    if free and (worker.name in useful or _tried(worker, runs)):
                        ended.remove((worker, code))
                        workers.append(fleet.again(worker))
                if not (workers or stopping) and abroad.intersection(free):
                    workers.append(fleet.again(ended[-1][0]))  # who trained it elsewhere is gone
                for worker in workers:
                    if worker.name not in names:
                        view.say(f"worker {worker.name} begins")
                        names.add(worker.name)
                abroad = {s.run.name for s in states if s.held and s.holder.worker not in names}
        finally:
            for worker in workers:
                worker.stop(signal.SIGTERM)
        states = [run_state(run, updates) for run, updates in runs]
        view.show(states)
    _conclude(ended, states, asked.number)


def _tried(worker: Worker, runs: Runs) -> bool:
    """Whether it held a run when it died, or a run failed in its hands."""
    for run, _ in runs:
        holder = look(run.lock)
        if holder.worker == worker.name and (holder.held or holder.failed is not None):
            return True
    return False


def _end(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ": by hand, by the system, or out of memory" if -code == signal.SIGKILL else ""
    return f"was killed ({name}{hint})"


def _conclude(ended: Sequence[tuple[Worker, int]], states: Sequence[RunState], number: int) -> None:
    """One end of all workers' ends, and of what the runs' files say."""
    said = {code: worker for worker, code in ended}
    again = "the same command goes on with what is left"
    if number and not all(state.over for state in states):
        raise InterruptedRun(f"stopped; {summary_line(states)}", do=again, signal_number=number)
    if 2 in said:
        raise _message(UsageError, said[2])
    failed = [state for state in states if state.state == "failed"]
    if failed:
        names = ", ".join(state.run.name for state in failed)
        reasons = "; ".join(dict.fromkeys(state.reason for state in failed))
        raise FailedRunsError(
            f"{len(failed)} of the runs failed: {names} ({reasons})",
            do="the same command tries them again; the others are done",
        )
    if 1 in said:
        raise _message(FailedRunsError, said[1])
    diverged = [state.run.name for state in states if state.state == "diverged"]
    if diverged:
        raise DivergedError(
            f"{len(diverged)} of the runs diverged: {', '.join(diverged)}",
            do="run.json of each names the update and the utterances; the other runs are done",
        )
    for code, kind in ((4, DivergedError), (3, DataError)):
        if code in said:
            raise _message(kind, said[code])
    left = [state.run.name for state in states if not state.over]
    if left:
        found = f"{len(left)} of the runs are left: {', '.join(left)}"
        stopped = next((code - 128 for code in said if code > 128), 0)
        if stopped:
            raise InterruptedRun(found, do=again, signal_number=stopped)
        ends = "; ".join(f"worker {worker.name} {_end(code)}" for worker, code in ended if code)
        raise FailedRunsError(f"{found}; {ends}" if ends else found, do=again)


def _message(kind: type[W2vrepError], worker: Worker) -> W2vrepError:
    """What a worker said at its end."""
    try:
        text = worker.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    before, mark, last = text.rpartition("w2vrep: ")
    if not mark or not (not before or before.endswith("\n")):
        return kind(f"worker {worker.name} ended without a word", do=f"see {worker.log}")
    found, *rest = last.strip().splitlines()
    return kind(found, do="\n".join(rest).strip())


class _Requests:
    """Counts what SIGINT, SIGTERM and SIGUSR1 ask, the last two alike."""

    def __init__(self) -> None:
        self.count, self.number = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Requests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.count:
            os.write(2, b"\nstopping after the updates in work; once more quits at once\n")
        self.count += number != signal.SIGUSR1 or not self.count
        self.number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


# ---------------------------------------------------------------------------------------- showing


class _Lines:
    """The view where nobody looks: a line a change."""

    def __init__(self) -> None:
        self._last = 0.0
        self._known: dict[str, tuple[object, ...]] = {}

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= VIEW_SECONDS

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def show(self, states: Sequence[RunState]) -> None:
        self._last = time.monotonic()
        for state in states:
            seen = (state.state, state.holder.worker, state.valid)
            if self._known.get(state.run.name, ("waiting", "", None)) != seen:
                self.say(state_line(state))
            self._known[state.run.name] = seen


class _Table(_Lines):
    """The view on a terminal: the table of ``w2vrep status``, in place."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self.live = Live(console=Console(stderr=True), auto_refresh=False)

    def say(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False)

    def show(self, states: Sequence[RunState]) -> None:
        from rich.text import Text

        self._last = time.monotonic()
        lines = list(status_lines(states))
        if len(lines) >= self.live.console.height:  # those that say nothing are in the last line
            quiet = ("waiting", "finished")
            shown = [state for state in states if state.state not in quiet]
            lines = [*list(status_lines(shown))[:-1], summary_line(states)]
        self.live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)


@contextlib.contextmanager
def _view() -> Iterator[_Lines]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    table = _Table()
    with table.live:
        yield table
