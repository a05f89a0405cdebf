"""One file over HTTP: resumed where it was cut off, with a progress bar, kept only if its SHA-256
is the right one."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from reproduce import __version__
from reproduce.errors import DataError

BLOCK = 1 << 20
TIMEOUT = 60.0
"""Seconds without a byte after which the server is asked again."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt; any progress starts them anew."""


class _Cut(Exception):
    """The connection failed, or ended early: worth another attempt."""


def remote_size(url: str) -> int | None:
    """Bytes the server says the file has.

    Raises:
        DataError: there is no such file, or no such server.
    """
    for wait in (*WAITS, None):
        try:
            with _open(url, method="HEAD") as response:
                length = response.headers.get("Content-Length")
                return int(length) if length and length.isdigit() else None
        except _Cut as error:
            _wait(wait, url, error)
    raise AssertionError


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch `url` to `target`; what was fetched before (``NAME.part``) is not fetched again.

    Raises:
        DataError: it can't be fetched, or isn't what it should be.
    """
    part = partial(target)
    waits = iter(WAITS)
    while True:
        before = _size(part)
        try:
            _continue(url, part)
            break
        except _Cut as error:
            if _size(part) > before:
                waits = iter(WAITS)
            _wait(next(waits, None), url, error)
    found = file_sha256(part, f"checking {target.name}")
    if found != sha256:
        part.unlink()
        raise DataError(
            f"SHA-256 is {found}, expected {sha256}",
            where=url,
            do="what was fetched is deleted; run the same command again, or set data.download_url "
            "to another mirror",
        )
    os.replace(part, target)


def partial(target: Path) -> Path:
    """Where a download lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def file_sha256(path: Path, what: str) -> str:
    """SHA-256 of a file, with a progress bar for large ones."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    hide = True if total < 1 << 28 else None
    with (
        open(path, "rb", buffering=0) as file,
        tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hide) as bar,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _continue(url: str, part: Path) -> None:
    """Append what `part` lacks."""
    start = _size(part)
    try:
        with _open(url, start=start) as response:
            if response.status == 200:
                start = 0  # the server doesn't continue: from the beginning
            total = _total(response, start)
            with (
                open(part, "r+b" if start else "wb") as file,
                tqdm(
                    total=total, initial=start, desc=url.rpartition("/")[2],
                    unit="B", unit_scale=True, disable=None,
                ) as bar,
            ):  # fmt: skip
                file.seek(start)
                for block in _blocks(response):
                    file.write(block)
                    bar.update(len(block))
                file.truncate()
                end = file.tell()
            if total is not None and end != total:
                raise _Cut(f"{end} of {total} bytes arrived")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond: it is whole, or of another file
            length = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if length and int(length[1]) == start:
                return
            part.unlink()
            raise _Cut("what was fetched before is of another file") from None
        raise


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(str(error) or type(error).__name__) from None
        if not block:
            return
        yield block


def _total(response: http.client.HTTPResponse, start: int) -> int | None:
    """Bytes of the whole file."""
    if response.status == 206:
        pattern = r"bytes (\d+)-\d+/(\d+|\*)"
        match = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != start:
            raise _Cut("the server sent another range than was asked for")
        if match[2] != "*":
            return int(match[2])
    length = response.headers.get("Content-Length")
    return start + int(length) if length and length.isdigit() else None


@contextmanager
def _open(url: str, method: str = "GET", start: int = 0) -> Iterator[http.client.HTTPResponse]:
    headers = {"User-Agent": f"w2vrep/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise
        if error.code >= 500 or error.code in (408, 429):
            raise _Cut(f"HTTP {error.code} {error.reason}") from None
        raise DataError(
            f"HTTP {error.code} {error.reason}",
            where=url,
            do="set data.download_url to a mirror that has it, or fetch it by hand to data.root",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(getattr(error, "reason", "") or error or type(error).__name__)) from None
    with response:
        yield response


def _wait(seconds: float | None, url: str, error: _Cut) -> None:
    if seconds is None:
        raise DataError(
            f"can't be fetched: {error}",
            where=url,
            do="run the same command again: it goes on where it was; or set data.download_url to "
            "another mirror",
        ) from None
    time.sleep(seconds)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
