"""LibriSpeech, or any tree in its layout: ``PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac``.

Transcripts are ``*.trans.txt`` files beside the audio, a line an utterance: id, space, text.
Corpus order is the parts as given (train, valid, test), and by id within a part. LibriSpeech's ids
are unique over its parts; in trees where they aren't, an id met again in a later part is written
``PART/ID``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from reproduce.data.corpora import Item, Rejected, Utterance
from reproduce.data.corpora.files import AUDIO_SUFFIXES, FileAudio, corpus_root, leaves, walk
from reproduce.errors import DataError

NO_TRANSCRIPT = "no transcript"
OUTSIDE = "path leaves the corpus folder"


def utterances(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
) -> Iterator[Item]:
    """Utterances of the named parts.

    Args:
        root: the folder that holds the parts, or the one that holds ``LibriSpeech/``.
        train_parts, valid_parts, test_parts: folder names under the root.

    Raises:
        DataError: the root or a part is missing, or a part is named twice.
    """
    base = corpus_root(root, "librispeech")
    splits = {"train": train_parts, "valid": valid_parts, "test": test_parts}
    parts = [(split, part) for split, names in splits.items() for part in names]
    base = _base(base, [part for _, part in parts])
    owners: dict[str, str] = {}
    for split, part in parts:
        for item in _part(base, part, split):
            if isinstance(item, Utterance) and owners.setdefault(item.id, part) != part:
                item = replace(item, id=f"{part}/{item.id}")
            yield item


def _base(root: Path, parts: Sequence[str]) -> Path:
    if twice := sorted({part for part in parts if parts.count(part) > 1}):
        raise DataError(f"part named twice: {', '.join(twice)}", where="data", do="name it once")
    if bad := [part for part in parts if Path(part).name != part]:
        raise DataError(
            f"not the name of a part: {bad[0]!r}",
            where="data",
            do="name folders under data.root, such as train-clean-100",
        )
    base = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    if missing := [part for part in parts if not (base / part).is_dir()]:
        there = sorted(path.name for path in base.iterdir() if path.is_dir())
        raise DataError(
            f"no part {', '.join(missing)}; folders there: {', '.join(there) or 'none'}",
            where=str(base),
            do="set data.root to the folder that holds the parts, or name parts that are there",
        )
    return base


def _part(base: Path, part: str, split: str) -> Iterator[Item]:
    # The part is what the user named, so a part that is itself a link is followed.
    inside = (base / part).resolve()
    for folder, names in walk(base / part):
        audio, transcripts = _files(names)
        if not audio and not transcripts:
            continue
        texts: dict[str, str] = {}
        rejected: list[Rejected] = []
        for name in transcripts:
            path = folder / name
            if path.is_symlink() and leaves(path, inside):
                rejected.append(Rejected(_relative(path, base), None, OUTSIDE))
            else:
                rejected += _read_transcripts(path, _relative(path, base), texts)
        for id_ in sorted(texts.keys() | audio.keys()):
            for name in audio.get(id_, [""])[1:]:
                source = _relative(folder / name, base)
                rejected.append(Rejected(source, id_, "duplicate id: a second file of that name"))
            if id_ not in audio:
                source = _relative(folder / id_, base)
                rejected.append(Rejected(source, id_, "no audio file for this transcript"))
                continue
            path = folder / audio[id_][0]
            source = _relative(path, base)
            if path.is_symlink() and leaves(path, inside):
                rejected.append(Rejected(source, id_, OUTSIDE))
            elif id_ not in texts:
                rejected.append(Rejected(source, id_, NO_TRANSCRIPT))
            else:
                speaker = id_.partition("-")[0]
                yield Utterance(id_, split, speaker, texts[id_], source, FileAudio(path))
        yield from rejected


def _files(names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Audio files by stem, and transcript files."""
    audio: dict[str, list[str]] = {}
    transcripts = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in AUDIO_SUFFIXES:
            audio.setdefault(stem, []).append(name)
        elif name.endswith(".trans.txt"):
            transcripts.append(name)
    return audio, transcripts


def _read_transcripts(path: Path, source: str, texts: dict[str, str]) -> Iterator[Rejected]:
    """Add the lines of a ``.trans.txt`` to `texts`; yield what can't be taken."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        yield Rejected(source, None, f"transcripts can't be read: {error}")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        id_, *text = line.split(maxsplit=1)
        if id_ in texts:
            yield Rejected(f"{source}:{number}", id_, "duplicate id: a second transcript")
        else:
            texts[id_] = "".join(text)


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()
