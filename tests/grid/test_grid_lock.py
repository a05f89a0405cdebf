"""Locks that say who holds them: taken once, wiped, left behind, and what hosts can't see."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from reproduce.errors import UsageError
from reproduce.grid import lock as module
from reproduce.grid.lock import (
    Holder,
    RunLock,
    beating,
    grid_started,
    holder_of,
    look,
    require_locks,
)

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.delenv(module.WORKER, raising=False)
    monkeypatch.delenv(module.STARTED, raising=False)


def die(lock: RunLock) -> None:
    os.close(lock._file)
    lock._file = -1


def write(path: Path, holder: Holder) -> None:
    lock = RunLock(path, 0.0)
    lock._write(holder)
    die(lock)


def test_one_holds_it_and_all_see_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = tmp_path / ".lock", time.time()
    monkeypatch.setenv(module.WORKER, "2")
    first, second = RunLock(path, before, "cuda 3"), RunLock(path, before)
    assert first.take() == "taken"
    assert second.take() == "busy"
    found, held = holder_of(path)
    assert held
    assert second.before == found
    assert (found.host, found.pid, found.device, found.worker) == (HOST, os.getpid(), "cuda 3", "2")
    assert before <= found.since == found.beat <= time.time()
    assert str(found) == f"process {os.getpid()} on {HOST}, worker 2"
    first.release()
    assert holder_of(path) == (Holder(), False)  # no name is left behind
    assert HOST not in path.read_text()
    assert second.take() == "taken"
    assert not second.before.held
    second.release()
    second.release()


def test_a_process_of_its_own_and_its_death(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom reproduce.grid.lock import RunLock\n"
        f"print(RunLock(Path({str(path)!r}), 0.0).take(), flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "taken\n"
    mine = RunLock(path, 0.0)
    assert mine.take() == "busy"
    assert mine.before.pid == child.pid
    child.kill()
    child.wait()
    child.stdout.close()
    found, held = holder_of(path)
    assert (found.held, found.pid, held) == (True, child.pid, False)
    assert mine.take() == "taken"
    assert mine.before.pid == child.pid
    mine.release()


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[1]", b'{"held": true'])
def test_a_file_that_says_nothing_is_nobody(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(content)
    assert look(path) == Holder()
    lock = RunLock(path, 0.0)
    assert lock.take() == "taken"
    assert look(path).pid == os.getpid()
    lock.release()
    assert look(tmp_path / "none") == Holder()
    assert holder_of(tmp_path / "none") == (Holder(), False)


def test_two_deaths_within_a_grid(tmp_path: Path) -> None:
    path, began = tmp_path / ".lock", time.time()
    for deaths in range(2):
        lock = RunLock(path, began)
        assert lock.take() == "taken"
        assert look(path).deaths == deaths
        die(lock)
    third = RunLock(path, began)
    assert third.take() == "died"
    third.release()
    later = RunLock(path, time.time())  # another command: those deaths were before its time
    assert later.take() == "taken"
    assert look(path).deaths == 0
    later.release()


def test_a_failure_lasts_as_long_as_its_grid(tmp_path: Path) -> None:
    path, began = tmp_path / ".lock", time.time()
    lock = RunLock(path, began)
    lock.take()
    lock.release(failed=True)
    second = RunLock(path, began)
    assert second.take() == "failed"
    second.release()
    later = RunLock(path, time.time())
    assert later.take() == "taken"
    later.release()


def test_all_workers_of_a_grid_began_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(grid_started() - time.time()) < 5
    monkeypatch.setenv(module.STARTED, "123.5")
    assert grid_started() == 123.5


def test_the_heart_beats_while_it_is_held(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / ".lock", 0.0)
    lock.take()
    first = look(lock.path)
    with beating([lock]):
        deadline = time.monotonic() + 10
        while look(lock.path).beat == first.beat:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert look(lock.path) == replace(first, beat=look(lock.path).beat)
    lock.require_kept()
    lock.release()
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]


# ------------------------------------------------------------------------------------ other hosts


def test_a_living_holder_of_another_host_whose_lock_is_free(tmp_path: Path) -> None:
    """flock doesn't reach from host to host here: refused, for both would train the run."""
    path = tmp_path / ".lock"
    other = Holder(True, "elsewhere", 7, time.time(), time.time())
    write(path, other)
    assert holder_of(path)[1]  # what status believes
    timer = threading.Timer(0.05, write, [path, replace(other, beat=other.beat + 15)])
    timer.start()
    with pytest.raises(UsageError, match="process 7 on elsewhere trains this run and its lock is"):
        RunLock(path, 0.0).take()
    timer.join()


def test_a_dead_holder_of_another_host(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for beat in (time.time(), time.time() - 3600):  # watched; long forgotten
        write(path, Holder(True, "elsewhere", 7, beat, beat))
        lock = RunLock(path, 0.0)
        assert lock.take() == "taken"
        assert lock.before.host == "elsewhere"
        lock.release()
    write(path, Holder(True, "elsewhere", 7, 0.0, time.time() - 3600))
    assert not holder_of(path)[1]


def test_another_host_that_took_it_at_the_same_moment(tmp_path: Path) -> None:
    """Both believe they have it: the next heartbeat finds the other's name, and asks to stop."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        lock = RunLock(tmp_path / ".lock", 0.0)
        lock.take()
        other = Holder(True, "elsewhere", 7, time.time(), time.time())
        write(lock.path, other)
        with beating([lock]):
            deadline = time.monotonic() + 10
            while not asked:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(UsageError, match="process 7 on elsewhere trains this run too"):
        lock.require_kept()
    lock.release()
    assert look(lock.path) == other  # its name stays


# --------------------------------------------------------------------------------- file systems


def test_a_folder_whose_locks_work(tmp_path: Path) -> None:
    require_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_locks_that_hold_nobody_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.fcntl, "flock", lambda *_: None)
    with pytest.raises(UsageError, match="two processes got the same lock") as refused:
        require_locks(tmp_path)
    assert refused.value.exit_code == 2
    assert str(tmp_path) in str(refused.value)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="No locks available"):
        require_locks(tmp_path)
