"""What corpora made of audio files share."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reproduce.data.audio import MAX_VALUES, AudioError, Decoded, decode, duration
from reproduce.data.corpora import AudioSource
from reproduce.errors import DataError, MissingCorpusError

AUDIO_SUFFIXES = frozenset({
    ".flac", ".wav", ".wave", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
    ".ogg", ".oga", ".opus", ".mp3", ".sph", ".nist", ".wv1", ".wv2", ".svx", ".8svx", ".16svx",
})  # fmt: skip
"""File names taken for audio when a folder is searched, of every container that is decoded; the
content decides how."""

MAX_BYTES = 4 * MAX_VALUES
"""A larger file isn't read at all."""

OUTSIDE = "path leaves the corpus folder"
FOLDER_LINK = "link to a folder: not followed"


@dataclass(frozen=True)
class FileAudio(AudioSource):
    """A whole audio file."""

    path: Path

    def load(self) -> Decoded:
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise AudioError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise AudioError(f"too large: {status.st_size} bytes; cut it into utterances")
        return BytesAudio(self.path.read_bytes()).load()

    def seconds(self) -> float:
        if not self.path.is_file():
            raise AudioError("not a regular file")
        return duration(self.path)

    def stamp(self) -> str:
        try:
            status = self.path.stat()
        except OSError:
            return "missing"
        return f"{status.st_size}:{status.st_mtime_ns}"


@dataclass(frozen=True)
class BytesAudio(AudioSource):
    """A whole audio file held in memory."""

    data: bytes

    def load(self) -> Decoded:
        samples, rate = decode(self.data)
        return Decoded(samples, rate, hashlib.sha256(self.data).hexdigest())

    def seconds(self) -> float:
        return duration(self.data)


def corpus_root(root: Path | str | None, corpus: str) -> Path:
    """The resolved root folder of a corpus.

    Raises:
        MissingCorpusError: no root was given, or it isn't there.
        DataError: it is no folder.
    """
    if not root:
        raise MissingCorpusError(
            f"corpus {corpus} needs the folder it lies in",
            where="data.root",
            do="set it: --set data.root=FOLDER",
        )
    path = Path(root).expanduser()
    do = "set data.root to the corpus folder: --set data.root=FOLDER"
    try:
        if path.is_dir():
            return path.resolve()
        kind = DataError if path.exists() else MissingCorpusError
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=str(path), do=do) from None
    found = "not a folder" if kind is DataError else "no such folder"
    raise kind(found, where=str(path), do=do)


def unusable(path: Path, root: Path) -> str:
    """Why `path` can't be taken: with ``..`` and links followed it lies outside the resolved folder
    `root`, or leads nowhere. Empty if it can; that it exists isn't asked.
    """
    try:
        try:
            real = os.path.realpath(path, strict=True)
        except FileNotFoundError:
            real = os.path.realpath(path)
    except (OSError, RuntimeError, ValueError) as error:
        return f"not a usable path: {getattr(error, 'strerror', None) or error}"
    return "" if Path(real).is_relative_to(root) else OUTSIDE


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders under `root` with the names of their files and of links to folders, both sorted.

    Links to folders aren't followed; what is hidden is passed over.

    Raises:
        DataError: a folder can't be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"folder can't be read: {error.strerror}", where=str(error.filename))

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        yield Path(folder), sorted(name for name in names if not name.startswith(".")), links
