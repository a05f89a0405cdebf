"""Room on disk: how much there is, and one clear error where it isn't enough."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reproduce.errors import DataError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
UNWRITABLE = {*FULL, *FORBIDDEN, errno.EEXIST, errno.ENOTDIR}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the remedy where the disk turns out to be full, or can't be written.

    Raises:
        DataError: it is, or can't.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _told(error, str(folder), "can't be written: ") from None


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Say of a system's error that names no place that it happened in `folder`.

    Raises:
        OSError: as it came.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise


def disk_error(error: OSError) -> DataError | None:
    """What a system's error says of the disk, and what to do; None if it says something else."""
    if error.errno in FULL:
        return _told(error, str(error.filename or ""), "can't be written: ")
    if error.errno in FORBIDDEN:  # to be read or to be written: it doesn't tell
        return _told(error, str(error.filename or ""), "")
    return None


def _told(error: OSError, where: str, found: str) -> DataError:
    do = "get the right to it, or choose another folder"
    if error.errno in FULL:
        do = (
            "make room there, then run the same command again: it goes on where it was; or begin "
            "in a folder on another disk"
        )
    return DataError(f"{found}{error.strerror}", where=where, do=do)


def can_write(folder: Path) -> bool:
    """Whether files may be made in `folder`, or it isn't there."""
    effective = os.access in os.supports_effective_ids
    return not folder.exists() or os.access(folder, os.W_OK, effective_ids=effective)


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is, or will be made."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check that `needed` bytes are free.

    Raises:
        DataError: they aren't.
    """
    free = free_bytes(folder)
    if needed > free:
        raise DataError(
            f"{what} takes {size(needed)}, {size(free)} are free",
            where=str(folder),
            do="make room, or choose a folder on another disk",
        )


def size(count: int | float) -> str:
    """Bytes for people: ``6.4 GiB``."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
