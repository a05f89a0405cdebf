"""A run's lock: ``flock`` decides who trains it, the file's content says who that is. No torch.

The content is one JSON object: host, process, since when, and a heartbeat. Whoever lets go wipes
it; whoever dies leaves it behind, so that the next one knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from reproduce.errors import UsageError

BEAT_SECONDS = 15.0
"""Between two heartbeats."""
FORGOTTEN_SECONDS = 600.0
"""A heartbeat of another host this old needs no watching: nobody's clock is that wrong."""
DEATHS = 2
"""So many processes may die over a run within one grid before it counts as failed."""
SIZE = 512
"""Bytes of the content, padded, so that it is written in one piece and nothing is cut off."""
STARTED, WORKER = "W2VREP_GRID_STARTED", "W2VREP_WORKER"
"""What a grid of several workers tells each: when it began, and the worker's name."""

Taken = Literal["taken", "busy", "failed", "died"]


def is_worker() -> bool:
    """Whether a grid of several workers started this process, which then waits for nobody."""
    return WORKER in os.environ


def grid_started() -> float:
    """When the command began that this process belongs to, Unix time."""
    return float(os.environ.get(STARTED) or time.time())


@dataclass(frozen=True)
class Holder:
    """What a lock's file says.

    Attributes:
        held: whether somebody holds it, or died holding it.
        since, beat: when it was taken, and the last sign of life; Unix time.
        device: what it trains on.
        worker: name of the worker, of a grid of several; also of one in whose hands it failed.
        deaths: processes that died over this run in the grid that this one belongs to.
        failed: when an attempt ended with an error, if the last one did.
    """

    held: bool = False
    host: str = ""
    pid: int = 0
    since: float = 0.0
    beat: float = 0.0
    device: str = ""
    worker: str = ""
    deaths: int = 0
    failed: float | None = None

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}" if self.host else "another process"
        return f"{where}, worker {self.worker}" if self.worker else where


class RunLock:
    """One run's lock, for a process that wants to train it.

    Args:
        path: of the file, in a folder that exists.
        started: when this process's grid began, see :func:`grid_started`.
        device: what it would train on.
    """

    def __init__(self, path: Path, started: float, device: str = "") -> None:
        self.path, self.started, self.device = path, started, device
        self.before = Holder()
        self.lost = False
        self._mine: Holder | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self) -> Taken:
        """Take the lock if it is free and the run is worth an attempt.

        Returns:
            busy: another process holds it. failed: an attempt of this grid ended with an error.
            died: `DEATHS` processes of this grid died over it. `before` says who it was.

        Raises:
            UsageError: the holder lives on another host, whose lock isn't seen here.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.before = _read(self._file)
            return "busy"
        before = self.before = _read(self._file)
        if before.held and before.host != socket.gethostname():
            self._require_dead(before)
        if before.failed is not None and before.failed >= self.started:
            return "failed"
        deaths = before.deaths + 1 if before.held and before.since >= self.started else 0
        if deaths >= DEATHS:
            return "died"
        now = time.time()
        worker = os.environ.get(WORKER, "")
        self._mine = Holder(
            True, socket.gethostname(), os.getpid(), now, now, self.device, worker, deaths
        )
        self._write(self._mine)
        return "taken"

    def _require_dead(self, before: Holder) -> None:
        """A holder of another host whose heart still beats holds a lock that we just took."""
        until = time.monotonic() + 2.5 * BEAT_SECONDS
        while time.time() - before.beat < FORGOTTEN_SECONDS and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 10)
            now = look(self.path)
            if now.held and now.host == before.host and now.beat != before.beat:
                raise _no_locks(self.path.parent, f"{before} trains this run and its lock is free")

    def beat(self) -> None:
        """A sign of life; notices if another host took the run in spite of the lock."""
        if self._mine is None:
            return
        found = look(self.path)
        if (found.host, found.pid, found.held) != (self._mine.host, self._mine.pid, True):
            self.lost = True
            self.before = found
            return
        self._mine = replace(self._mine, beat=time.time())
        self._write(self._mine)

    def release(self, failed: bool = False) -> None:
        """Let go; ``failed``: this grid tries the run no more."""
        if self._file < 0:
            return
        if (self._mine is not None and not self.lost) or failed:
            who = os.environ.get(WORKER, "") if failed else ""
            with contextlib.suppress(OSError):  # a full disk: the next one finds a dead holder
                self._write(Holder(worker=who, failed=time.time() if failed else None))
        self._mine = None
        os.close(self._file)
        self._file = -1

    def require_kept(self) -> None:
        """Raise UsageError if another host took the run too."""
        if self.lost:
            raise _no_locks(self.path.parent, f"{self.before} trains this run too")

    def _write(self, holder: Holder) -> None:
        os.pwrite(self._file, json.dumps(asdict(holder)).encode().ljust(SIZE), 0)
        os.fsync(self._file)


@contextlib.contextmanager
def beating(locks: Sequence[RunLock]) -> Iterator[None]:
    """Heartbeats while the body runs; asks the process to stop if a lock turns out not to hold."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            for lock in locks:
                with contextlib.suppress(OSError):  # a full disk ends no run here
                    lock.beat()
            if any(lock.lost for lock in locks):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def look(path: Path) -> Holder:
    """What a lock's file says now."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Holder()
    try:
        return _read(file)
    finally:
        os.close(file)


def holder_of(path: Path) -> tuple[Holder, bool]:
    """What a lock's file says, and whether somebody holds the lock.

    A holder on another host is believed as long as its heart beats.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Holder(), False
    try:
        found = _read(file)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return found, True
        elsewhere = found.held and found.host != socket.gethostname()
        return found, elsewhere and time.time() - found.beat < 4 * BEAT_SECONDS
    finally:
        os.close(file)


def _read(file: int) -> Holder:
    """Of an empty file, or one that another version wrote: nobody."""
    try:
        raw = json.loads(os.pread(file, SIZE, 0))
        return Holder(**{k: v for k, v in raw.items() if k in Holder.__dataclass_fields__})
    except (ValueError, AttributeError):
        return Holder()


_TRY = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(0)
sys.exit(1)
"""


def require_locks(folder: Path) -> None:
    """Two processes, one lock: only one may get it.

    Raises:
        UsageError: the file system has no working ``flock``.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-test-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _no_locks(folder, error.strerror or str(error)) from None
        second = [sys.executable, "-I", "-S", "-c", _TRY, file.name]
        if subprocess.run(second, check=False, capture_output=True).returncode:
            raise _no_locks(folder, "two processes got the same lock")


def _no_locks(folder: Path, found: str) -> UsageError:
    return UsageError(
        f"files can't be locked here: {found}",
        where=str(folder),
        do="choose a --work folder on a file system whose flock works on every host (NFS 4, or "
        "Lustre mounted with flock), or train on one host alone",
    )
