"""Hashes of large files, read once and remembered beside them in ``.verified.json``.

A hash is remembered with the file's inode, size, time of writing and time of change. No program can
set the last one, and every copy has another inode: so what was copied (with its times or without),
written or exchanged is read again, once, by one process; and what is remembered as whole is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from reproduce.data.disk import UNWRITABLE, size
from reproduce.errors import DataError
from reproduce.records import write_text

MEMORY = ".verified.json"
BLOCK = 1 << 20
THREADS = 8
LARGE = 2**30
"""bytes: reading more than this through is told."""
TICK, COARSE_TICK = 0.05, 2.0
"""s: writes further apart have different times; the second where times are whole seconds."""


def sha256_of(folder: Path, files: Mapping[str, int]) -> dict[str, str]:
    """Hashes of open files: those remembered, the others read, by one process at a time.

    Args:
        folder: where they lie, and what is remembered of them.
        files: name -> descriptor.

    Returns:
        name -> SHA-256 in hex.

    Raises:
        DataError: a file was written while it was read.
    """
    known = _recall(folder, files)
    if known.keys() >= files.keys():
        return known
    with _alone(folder):
        known = _recall(folder, files)  # another process may have read them meanwhile
        due = {name: file for name, file in files.items() if name not in known}
        if due:
            for file in due.values():
                _let_settle(file)
            known |= read_through(folder, due)
            remember(folder, files, known)
    return known


def remember(folder: Path, files: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    """Note the hashes of open files, and forget all others.

    Where the folder can't be written nothing is noted: every process reads for itself.
    """
    noted = {name: [*_identity(file), hashes[name]] for name, file in files.items()}
    try:
        write_text(folder / MEMORY, json.dumps(noted, indent=0) + "\n")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        total = sum(os.fstat(file).st_size for file in files.values())
        if total > LARGE:
            print(
                f"warning: {folder} can't be written: that its {size(total)} are whole can't be "
                "noted, and every process reads them through",
                file=sys.stderr,
            )


def _recall(folder: Path, files: Mapping[str, int]) -> dict[str, str]:
    try:
        noted: dict[str, Any] = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        return {
            name: str(noted[name][-1])
            for name, file in files.items()
            if name in noted and noted[name][:-1] == _identity(file)
        }
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _identity(file: int) -> list[int]:
    status = os.fstat(file)
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of those that want to read the folder's files through."""
    try:
        file = _open_lock(folder)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process verifies {folder}: waiting", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(folder: Path) -> IO[str]:
    return open(folder / f"{MEMORY}.lock", "w")


def read_through(folder: Path, files: Mapping[str, int]) -> dict[str, str]:
    """Hashes of open files, whatever is remembered; several are read at a time.

    Raises:
        DataError: a file was written while it was read.
    """
    total = sum(os.fstat(file).st_size for file in files.values())
    threads = min(THREADS, os.cpu_count() or 1)
    with (
        tqdm(
            total=total,
            desc=f"verifying {folder.name}/",
            unit="B",
            unit_scale=True,
            disable=None if total > LARGE else True,
            leave=False,
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):

        def hashed(name: str) -> str:
            file = files[name]
            before, digest, place = _identity(file), hashlib.sha256(), 0
            while block := os.pread(file, BLOCK, place):
                digest.update(block)
                place += len(block)
                bar.update(len(block))
            if _identity(file) != before:
                raise DataError(
                    "it was written while it was read",
                    where=str(folder / name),
                    do="run the same command again when nothing writes there",
                )
            return digest.hexdigest()

        return dict(zip(files, pool.map(hashed, files), strict=True))


def _let_settle(file: int) -> None:
    """Wait until a later write can't have the time of the last one."""
    status = os.fstat(file)
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    tick = TICK if changed % 10**9 else COARSE_TICK
    age = (time.time_ns() - changed) / 1e9
    if 0 <= age < tick:
        time.sleep(tick - age)
