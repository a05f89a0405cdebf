"""Room on disk: how much there is, and one clear error where it isn't enough."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reproduce.errors import DataError

UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
}  # fmt: skip


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
        raise DataError(
            f"can't be written: {error.strerror}",
            where=str(folder),
            do="make room (an hour of speech takes 110 MiB) or choose another --work folder, then "
            "run the same command again: it goes on where it was",
        ) from None


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
