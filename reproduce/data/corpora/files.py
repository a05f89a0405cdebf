"""What corpora made of audio files share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reproduce.data.audio import MAX_VALUES, AudioError, Decoded, decode
from reproduce.data.corpora import AudioSource
from reproduce.errors import DataError

AUDIO_SUFFIXES = frozenset({".flac", ".wav", ".ogg", ".opus"})
"""File names taken for audio when a folder is searched; the content decides how it is decoded."""

MAX_BYTES = 4 * MAX_VALUES
"""A larger file isn't read at all."""


@dataclass(frozen=True)
class FileAudio(AudioSource):
    """A whole audio file."""

    path: Path

    def load(self) -> Decoded:
        size = self.path.stat().st_size
        if size > MAX_BYTES:
            raise AudioError(f"too large: {size} bytes; cut it into utterances")
        data = self.path.read_bytes()
        samples, rate = decode(data)
        return Decoded(samples, rate, hashlib.sha256(data).hexdigest())

    def stamp(self) -> str:
        try:
            status = self.path.stat()
        except OSError:
            return "missing"
        return f"{status.st_size}:{status.st_mtime_ns}"


def corpus_root(root: Path | str | None, corpus: str) -> Path:
    """The resolved root folder of a corpus.

    Raises:
        DataError: no root was given, or it is no folder.
    """
    if not root:
        raise DataError(
            f"corpus {corpus} needs the folder it lies in",
            where="data.root",
            do="set it: --set data.root=FOLDER",
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(
            "not a folder" if path.exists() else "no such folder",
            where=str(path),
            do="set data.root to the corpus folder: --set data.root=FOLDER",
        )
    return path.resolve()


def leaves(path: Path, root: Path) -> bool:
    """Whether `path`, with ``..`` and links followed, lies outside the resolved folder `root`."""
    return not path.resolve().is_relative_to(root)


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders under `root` with their file names, both sorted; hidden ones and links to folders
    are passed over.

    Raises:
        DataError: a folder can't be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"folder can't be read: {error.strerror}", where=str(error.filename))

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))
