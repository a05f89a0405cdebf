"""Decode a corpus over processes and pack it: in order, in constant memory, resumable.

The folder being made holds shards of audio and a journal: one JSON line an item, written after its
audio. Started again on the same listing, packing drops a half-written tail and goes on behind it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from reproduce.data.audio import (
    BYTES_PER_SAMPLE,
    SAMPLE_RATE,
    SHARD_SAMPLES,
    AudioError,
    Int16,
    Packed,
    pack,
    shard_name,
)
from reproduce.data.corpora import DRAWN, SPLITS, AudioSource, Item, Rejected, Utterance
from reproduce.errors import DataError

FORMAT = 1
"""Raised when the same sources would be packed to something else."""

DUPLICATE = "duplicate id"

CHUNK = 8
"""Utterances a worker is sent at a time."""


@dataclass(frozen=True)
class Entry:
    """A packed utterance: a row of the manifest but for its subset, and what it was made from."""

    id: str
    split: str
    speaker: str
    samples: int
    offset: int
    text: str
    source: str
    sha256: str
    rate: int
    channels: int
    clipped: int


def listing_sha256(items: Iterable[Item], progress: bool = False) -> tuple[str, int]:
    """Hash of all that `items` lists (files by size and time, nothing decoded); their number.

    Args:
        progress: show how far it is where that takes long, as on a slow mount.
    """
    digest, count = hashlib.sha256(f"format {FORMAT}\n".encode()), 0
    hide = None if progress else True
    for item in tqdm(items, "listing", unit="utt", delay=2, disable=hide, leave=False):
        if isinstance(item, Utterance):
            stamp = item.audio.stamp()
            key = [item.id, item.split, item.speaker, item.text, item.source, stamp]
        else:
            key = [item.source, item.id or "", item.reason]
        digest.update(json.dumps(key).encode() + b"\n")
        count += 1
    return digest.hexdigest(), count


def clean(item: Item) -> Item:
    """The utterance with its text in NFC and single spaces, or rejected for what a field holds."""
    if isinstance(item, Rejected):
        return _rejected(item)
    text = unicodedata.normalize("NFC", " ".join(item.text.split()))
    reason = ""
    if not item.id:
        reason = "no id"
    elif item.split not in SPLITS and not item.split.startswith(DRAWN):
        reason = f"unknown split: {item.split!r}"
    elif all(c == " " or unicodedata.category(c) == "Cf" for c in text):  # nothing, or unseen
        reason = "no transcript"
    for name, value in (("id", item.id), ("transcript", text), ("speaker", item.speaker),
                        ("path", item.source)):  # fmt: skip
        for character in value:
            # Control characters and lone surrogates: they don't survive a CSV file.
            if not reason and unicodedata.category(character) in ("Cc", "Cs"):
                reason = f"{name} holds a control character: U+{ord(character):04X}"
    if reason:
        return _rejected(Rejected(item.source, item.id, reason, item.split))
    return replace(item, text=text)


def _rejected(item: Rejected) -> Rejected:
    """File names that aren't UTF-8 are written with escapes."""
    source, name, reason, split = (
        text.encode("utf-8", "backslashreplace").decode()
        for text in (item.source, item.id or "", item.reason, item.split)
    )
    return Rejected(source, name or None, reason, split)


class Journal:
    """Packed audio and ``journal.jsonl`` of a folder being made.

    Args:
        folder: where; made if need be.
        listing: hash of the items. What another listing left there is dropped.
        shard_samples: of each shard but the last.

    Attributes:
        done: items packed or rejected so far.
        samples: samples packed so far.
    """

    def __init__(self, folder: Path, listing: str, shard_samples: int = SHARD_SAMPLES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "journal.jsonl"
        self.done = self.samples = 0
        self._ids: set[str] = set()
        about = {"listing": listing, "shard_samples": shard_samples}
        header = json.dumps(about).encode() + b"\n"
        self._audio = _Shards(folder, shard_samples)
        end = self._recover(header)
        self._audio.go_on(self.samples)
        self._lines = _open_at(self.path, end)
        if not end:
            self._lines.write(header)
            self._lines.flush()

    def _recover(self, header: bytes) -> int:
        """Take over what is whole; returns where the journal goes on."""
        try:
            packed = self._audio.found()
            with open(self.path, "rb") as file:
                if file.readline() != header:
                    return 0
                end = file.tell()
                for line in file:
                    if not line.endswith(b"\n"):  # cut, even where it can be read
                        break
                    try:
                        entry = _parse(line)
                    except (ValueError, TypeError):
                        break
                    if isinstance(entry, Entry):
                        if entry.offset + entry.samples > packed:
                            break
                        self._ids.add(entry.id)
                        self.samples = entry.offset + entry.samples
                    self.done += 1
                    end += len(line)
                return end
        except FileNotFoundError:
            return 0

    def add(self, item: Item, result: Packed | str) -> None:
        """Append one item: its audio, or the reason why it was rejected."""
        entry: Entry | Rejected
        if isinstance(item, Rejected):
            entry = item
        elif isinstance(result, str):
            entry = Rejected(item.source, item.id, result, item.split)
        elif item.id in self._ids:
            entry = Rejected(item.source, item.id, DUPLICATE, item.split)
        else:
            entry = Entry(
                item.id, item.split, item.speaker, len(result.samples), self.samples, item.text,
                item.source, result.sha256, result.rate, result.channels, result.clipped,
            )  # fmt: skip
            self._audio.write(result.samples)
            self.samples += entry.samples
            self._ids.add(item.id)
        self._lines.write(json.dumps(asdict(entry)).encode() + b"\n")
        self._lines.flush()
        self.done += 1

    def __iter__(self) -> Iterator[Entry | Rejected]:
        """Every entry, in order, from the file."""
        with open(self.path, "rb") as file:
            file.readline()
            for line in file:
                yield _parse(line)

    @property
    def shards(self) -> list[Path]:
        """The files of packed audio, in order."""
        return self._audio.paths

    def close(self) -> None:
        """Flush audio and journal to disk; the ids are let go of."""
        self._ids.clear()
        try:
            self._audio.close()
        finally:
            _close(self._lines)


class _Shards:
    """Audio written behind what is there, over files of a fixed length."""

    def __init__(self, folder: Path, shard_samples: int) -> None:
        self.folder, self.shard_samples = folder, shard_samples
        self.paths: list[Path] = []
        self.free = 0
        self._file: IO[bytes] | None = None

    def found(self) -> int:
        """Samples there, as far as the shards are whole."""
        total = 0
        for number in count():
            path = self.folder / shard_name(number)
            samples = path.stat().st_size // BYTES_PER_SAMPLE if path.exists() else 0
            total += min(samples, self.shard_samples)
            if samples < self.shard_samples:
                return total
        raise AssertionError

    def go_on(self, samples: int) -> None:
        """Open behind so many samples; what lies behind them goes."""
        whole = max(samples - 1, 0) // self.shard_samples
        self.paths = [self.folder / shard_name(number) for number in range(whole)]
        self._open(samples - whole * self.shard_samples)
        for number in count(whole + 1):
            if not (path := self.folder / shard_name(number)).exists():
                break
            path.unlink()

    def write(self, samples: Int16) -> None:
        """Append samples and flush them to the system."""
        while len(samples) > self.free:
            fitting = self.free
            self._write(samples[:fitting])
            self.close()
            self._open(0)
            samples = samples[fitting:]
        self._write(samples)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            _close(file)

    def _write(self, samples: Int16) -> None:
        assert self._file is not None
        self._file.write(samples.data)
        self._file.flush()
        self.free -= len(samples)

    def _open(self, within: int) -> None:
        self.paths.append(self.folder / shard_name(len(self.paths)))
        self._file = _open_at(self.paths[-1], within * BYTES_PER_SAMPLE)
        self.free = self.shard_samples - within


def _close(file: IO[bytes]) -> None:
    """Flush to disk."""
    try:
        file.flush()
        os.fsync(file.fileno())
    finally:
        file.close()


def _open_at(path: Path, end: int) -> IO[bytes]:
    file = open(path, "ab")  # noqa: SIM115 (Journal.close closes it)
    file.truncate(end)
    return file


def _parse(line: bytes) -> Entry | Rejected:
    fields = json.loads(line)
    return Rejected(**fields) if "reason" in fields else Entry(**fields)


def pack_into(
    journal: Journal, items: Iterable[Item], *, total: int, jobs: int, progress: bool
) -> None:
    """Decode and pack what the journal doesn't hold yet.

    Args:
        journal: being filled.
        items: all of them, from the start.
        total: their number, for the progress bar.
        jobs: processes; 1 decodes in this one.
        progress: show a bar.

    Raises:
        DataError: the corpus is damaged, or a worker process was killed.
    """
    rest = map(clean, islice(iter(items), journal.done, None))
    chunks = math.ceil((total - journal.done) / CHUNK)
    results = _decode_all(rest, min(jobs, max(chunks, 1)), journal.folder / "chunks")
    hide = None if progress else True  # None: where nobody looks on
    with tqdm(total=total, initial=journal.done, unit="utt", disable=hide) as bar:
        for item, result in results:
            journal.add(item, result)
            bar.update()
            if journal.done % 50 == 0:
                bar.set_description(f"packed {journal.samples / SAMPLE_RATE / 3600:.2f} h", False)


def _decode_all(
    items: Iterator[Item], jobs: int, scratch: Path
) -> Iterator[tuple[Item, Packed | str]]:
    if jobs == 1:
        for item in items:
            yield item, convert(item.audio) if isinstance(item, Utterance) else ""
        return
    # spawn: forked children of a process that has run threads (torch, tqdm) may hang.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[list[Item], Path, Future[list[Converted]]]] = deque()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        for number in count():
            if not (chunk := list(islice(items, CHUNK))):
                break
            sources = [item.audio.fetch() for item in chunk if isinstance(item, Utterance)]
            path = scratch / str(number)
            waiting.append((chunk, path, pool.submit(_convert_all, sources, path)))
            if len(waiting) > 2 * jobs:
                yield from _results(*waiting.popleft())
        while waiting:
            yield from _results(*waiting.popleft())
    except BrokenProcessPool:
        raise DataError(
            "a decoding process was killed, most likely for lack of memory",
            do="run the same command again: it goes on where it was; with fewer jobs it needs less",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(scratch, ignore_errors=True)


Converted = tuple[Packed | str, int]
"""A result without its samples, and how many of them lie in the chunk's file.

Samples go through a file (which the system keeps in memory): a quarter of what a pipe costs.
"""


def _results(
    chunk: list[Item], path: Path, future: Future[list[Converted]]
) -> Iterator[tuple[Item, Packed | str]]:
    converted = iter(future.result())
    pcm, start = np.fromfile(path, "<i2"), 0
    path.unlink()
    for item in chunk:
        result: Packed | str = ""
        if isinstance(item, Utterance):
            result, samples = next(converted)
            if isinstance(result, Packed):
                result = replace(result, samples=pcm[start : start + samples])
                start += samples
        yield item, result


def _convert_all(sources: list[AudioSource], path: Path) -> list[Converted]:
    converted: list[Converted] = []
    with open(path, "wb") as file:
        for source in sources:
            result, samples = convert(source), 0
            if isinstance(result, Packed):
                file.write(result.samples.data)
                samples = len(result.samples)
                result = replace(result, samples=result.samples[:0])
            converted.append((result, samples))
    return converted


def convert(source: AudioSource) -> Packed | str:
    """Decode and convert one source; a string is the reason why it can't be used."""
    try:
        return pack(source.load())
    except AudioError as error:
        return str(error)
    except OSError as error:
        if _gone(error):
            raise DataError(
                f"the corpus can't be read any more: {error.strerror}",
                where=str(error.filename or ""),
                do="see that what it lies on is there again, then run the same command again: it "
                "goes on where it was",
            ) from None
        return f"can't be read: {error.strerror or error}"


_GONE = {
    errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNABORTED, errno.ECONNRESET,
    errno.EMFILE, errno.ENFILE,
}  # fmt: skip
"""What a system says where it isn't the file's fault: its mount went away, or too many are open."""


def _gone(error: OSError) -> bool:
    """Whether an error is of the place that a corpus lies in, not of one file."""
    if error.errno == errno.ENOENT and error.filename:  # listed before: its folder was there
        return not os.path.lexists(os.path.dirname(error.filename))
    return error.errno in _GONE


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
