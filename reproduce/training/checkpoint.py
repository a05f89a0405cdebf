"""Checkpoints that are whole or absent; the newest two are kept."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

KEEP = 2
STATE = "state.pt"
DIGEST = "sha256.json"


def save_checkpoint(folder: Path, update: int, state: dict[str, Any]) -> Path:
    """Write ``folder/update-K`` under a temporary name, flush it, rename it; drop older ones.

    ``state`` holds tensors, numbers, strings and containers of them: what ``weights_only`` loads.

    Raises:
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"update-{update}"
    temporary = folder / f".update-{update}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(temporary, state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # where the disk is full it is in the way
        raise
    if target.exists():  # a damaged one of the same update
        _remove(target)
    os.replace(temporary, target)
    _sync_folder(folder)
    for old in list(_newest_first(folder))[KEEP:]:
        _remove(old)
    _sweep(folder)
    return target


def _write(folder: Path, state: dict[str, Any]) -> None:
    """The state and its hash, flushed to disk."""
    with open(folder / STATE, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(state, cast(IO[bytes], hashed))  # of which it writes only
        except RuntimeError:  # torch's own words where the disk is full
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    with open(folder / DIGEST, "w", encoding="utf-8") as file:
        json.dump({STATE: hashed.digest.hexdigest()}, file)
        file.flush()
        os.fsync(file.fileno())


class _Hashed:
    """A file to write to, hashed on the way: nothing is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class CheckpointWriter:
    """Saves checkpoints in a thread of its own, one after the other, while training goes on.

    What is to be saved is copied first, so that training may change it.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None

    def save(self, update: int, states: Sequence[tuple[Path, dict[str, Any]]]) -> None:
        """Copy states, each with the folder of its checkpoints, and begin to write them.

        Raises:
            OSError: the checkpoints before couldn't be written.
        """
        copies = [(folder, copied(state)) for folder, state in states]
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving = self._thread.submit(_save_all, update, copies)

    def check(self) -> None:
        """Raise what went wrong in the meantime."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Until all is written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Finish what is being written and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self.wait()


def _save_all(update: int, states: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    for folder, state in states:
        save_checkpoint(folder, update, state)


def copied(value: Any) -> Any:
    """A state on the CPU that shares nothing with what is trained."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        fresh = copy.copy(value)  # with what a state_dict says of its modules
        fresh.update({name: copied(item) for name, item in value.items()})
        return fresh
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def checkpoint_updates(folder: Path) -> list[int]:
    """The updates that whole checkpoints exist for, newest first; damaged ones give a warning."""
    return [_update(path) for path in _newest_first(folder) if _whole(path)]


def load_checkpoint(
    folder: Path, update: int, map_location: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The state of ``folder/update-K``; loads tensors and plain values only, never code."""
    path = folder / f"update-{update}" / STATE
    state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    return state


def drop_later_checkpoints(folder: Path, update: int) -> None:
    """Forget those after ``update``, which training goes on from: damaged, or not of all learners.

    They don't belong to the metrics.csv that is written from here on. What a killed process left
    half written or half removed goes too.
    """
    for path in _newest_first(folder):
        if _update(path) > update:
            _remove(path)
    _sweep(folder)


def _remove(path: Path) -> None:
    """Under a temporary name first, so that a checkpoint is never there by half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for litter in folder.glob(".update-*.tmp"):
        shutil.rmtree(litter, ignore_errors=True)


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [p for p in folder.glob("update-*") if re.fullmatch(r"update-\d+", p.name)]
    yield from sorted(found, key=_update, reverse=True)


def _update(path: Path) -> int:
    return int(path.name.removeprefix("update-"))


def _whole(path: Path) -> bool:
    try:
        digest = json.loads((path / DIGEST).read_text(encoding="utf-8"))[STATE]
        if digest == _sha256(path / STATE):
            return True
        problem = "its content doesn't match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error) or type(error).__name__
    warnings.warn(
        f"checkpoint {path.parent.parent.name}/{path.name} is damaged ({problem}); "
        "going back to the one before it",
        stacklevel=3,
    )
    return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
