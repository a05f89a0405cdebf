"""Hashes that are remembered: nothing is read twice, and nothing changed is taken for whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from reproduce.data import verified as module
from reproduce.data.verified import remember, sha256_of
from reproduce.errors import DataError

NAMES = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(name.encode() * 3000)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read through."""
    names: list[str] = []
    real = module.read_through

    def noting(folder: Path, files: dict[str, int]) -> dict[str, str]:
        names.extend(files)
        return real(folder, files)

    monkeypatch.setattr(module, "read_through", noting)
    return names


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(open(folder / name, "rb")).fileno() for name in NAMES}


def hashes(folder: Path) -> dict[str, str]:
    with opened(folder) as files:
        return sha256_of(folder, files)


def true_hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}


def rewrite(path: Path, data: bytes) -> None:
    """In place, with the times it had."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_each_file_is_read_once(folder: Path, read: list[str]) -> None:
    assert hashes(folder) == true_hashes(folder)
    assert sorted(read) == ["a", "b", "c"]
    assert hashes(folder) == true_hashes(folder)
    assert len(read) == 3
    (folder / "b").write_bytes(b"other")
    assert hashes(folder) == true_hashes(folder)
    assert read[3:] == ["b"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "a bit": lambda path: path.write_bytes(b"b" * 2999 + b"c"),
    "a bit, its time set back": lambda path: rewrite(path, b"b" * 2999 + b"c"),
    "touched": os.utime,
    "another file with its times": lambda path: (
        shutil.copy2(path, path.with_name("x")),
        os.replace(path.with_name("x"), path),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_may_have_changed_is_read_again(
    folder: Path, read: list[str], change: Callable[[Path], object]
) -> None:
    before = hashes(folder)
    del read[:]
    change(folder / "b")
    assert hashes(folder) == true_hashes(folder)
    assert read == ["b"]
    assert {n: h for n, h in before.items() if n != "b"}.items() <= hashes(folder).items()
    assert read == ["b"]


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copy2])
def test_a_copy_is_read_once_with_and_without_times(
    folder: Path, read: list[str], copy: Callable[..., object]
) -> None:
    """A copied memory says nothing of copied files."""
    hashes(folder)
    del read[:]
    other = folder.with_name("other")
    shutil.copytree(folder, other, copy_function=copy)
    (other / "a").write_bytes(b"damaged on the way")
    assert hashes(other) == true_hashes(other)
    assert sorted(read) == ["a", "b", "c"]
    hashes(other)
    assert len(read) == 3


def test_a_write_right_after_reading_is_noticed(folder: Path) -> None:
    """Also where it falls into the same tick of the clock as the write before."""
    for number in range(20):
        (folder / "a").write_bytes(b"%03d" % number)
        assert hashes(folder) == true_hashes(folder)
        rewrite(folder / "a", b"%03d" % (number + 500))
        assert hashes(folder) == true_hashes(folder)


def test_what_is_told_is_remembered_and_the_rest_forgotten(folder: Path, read: list[str]) -> None:
    with opened(folder) as files:
        remember(folder, files, dict.fromkeys(NAMES, "told"))
    assert hashes(folder) == dict.fromkeys(NAMES, "told")
    assert not read
    with opened(folder) as files:
        remember(folder, {"a": files["a"]}, {"a": "told"})
    assert hashes(folder) == true_hashes(folder) | {"a": "told"}


@pytest.mark.parametrize("harm", [b"", b"[]", b'{"a": 1, "b": [], "c": {}}', b"\xff", b'{"a": [1'])
def test_a_damaged_memory_is_no_memory(folder: Path, read: list[str], harm: bytes) -> None:
    hashes(folder)
    (folder / module.MEMORY).write_bytes(harm)
    assert hashes(folder) == true_hashes(folder)
    assert len(read) == 6
    assert sorted(json.loads((folder / module.MEMORY).read_text())) == ["a", "b", "c"]


def test_what_is_written_while_it_is_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread

    def writing(file: int, count: int, place: int) -> bytes:
        # while this one is read: another's thread could do it before its time is looked at
        if place and os.path.samestat(os.fstat(file), os.stat(folder / "b")):
            (folder / "b").write_bytes(b"x" * 3001)
        return pread(file, count, place)

    monkeypatch.setattr(os, "pread", writing)
    with pytest.raises(DataError, match="b: it was written while it was read"):
        hashes(folder)
    assert not (folder / module.MEMORY).exists()


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "write_text", refused)
    monkeypatch.setattr(module, "_open_lock", refused)
    monkeypatch.setattr(module, "LARGE", 1000)
    assert hashes(folder) == hashes(folder) == true_hashes(folder)
    assert len(read) == 6
    assert "can't be written: that its 8.8 KiB are whole can't be noted" in capsys.readouterr().err


PROCESS = """
import sys, time
from pathlib import Path
from reproduce.data import verified
real = verified.read_through
def slow(folder, files):
    print("reads", flush=True)
    time.sleep(1)
    return real(folder, files)
verified.read_through = slow
folder = Path(sys.argv[1])
files = {name: open(folder / name, "rb") for name in "abc"}
print(verified.sha256_of(folder, {n: f.fileno() for n, f in files.items()})["a"])
"""


def test_of_several_processes_one_reads(folder: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(folder)]
    started = time.monotonic()
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=120) for process in both]
    assert time.monotonic() - started < 120
    lines = [line for out, _ in printed for line in out.splitlines()]
    assert lines.count("reads") == 1
    assert lines.count(true_hashes(folder)["a"]) == 3
