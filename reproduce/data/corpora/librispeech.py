"""LibriSpeech, or any tree in its layout: ``PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac``.

The tree is there already, or is unpacked from ``PART.tar.gz`` in the root, or is downloaded.

Transcripts are ``*.trans.txt`` files beside the audio, a line an utterance: id, space, text.
Corpus order is the parts as given (train, valid, test), and by id within a part. LibriSpeech's ids
are unique over its parts; in trees where they aren't, an id met again in a later part is written
``PART/ID``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from reproduce.data.corpora import Item, Rejected, Utterance, in_parts
from reproduce.data.corpora.archives import PUBLISHED, URL, obtain
from reproduce.data.corpora.files import (
    AUDIO_SUFFIXES,
    FOLDER_LINK,
    FileAudio,
    corpus_root,
    unusable,
    walk,
)
from reproduce.errors import DataError, MissingCorpusError

NO_TRANSCRIPT = "no transcript"


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
        MissingCorpusError: the root or a part is missing.
        DataError: a part is named twice.
    """
    splits = {"train": train_parts, "valid": valid_parts, "test": test_parts}
    parts = [(split, part) for split, names in splits.items() for part in names]
    names = [part for _, part in parts]
    _check(names)
    base = _base(corpus_root(root, "librispeech"), names)
    if missing := _missing(base, names):
        folder = base if base.is_dir() else base.parent
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise MissingCorpusError(
            f"no part {', '.join(missing)}; folders there: {', '.join(there) or 'none'}",
            where=str(folder),
            do="set data.root to the folder that holds the parts or their archives, name parts "
            "that are there, or fetch them with --set data.download=true",
        )
    yield from in_parts((part, _part(base, part, split)) for split, part in parts)


def hours(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
    download: bool = False,
) -> float | None:
    """As published, where parts are still to be unpacked or downloaded."""
    names = [*train_parts, *valid_parts, *test_parts]
    known = all(name in PUBLISHED for name in names)
    if known and obtainable(root=root, train_parts=names, valid_parts=(), download=download):
        return sum(PUBLISHED[name].hours for name in names)
    return None


def obtainable(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
    download: bool = False,
) -> bool:
    """Parts are missing, and lie in archives or may be downloaded."""
    if not root:
        return False
    names = [*train_parts, *valid_parts, *test_parts]
    folder = Path(root).expanduser()
    base = _base(folder, names)
    missing = _missing(base, names)
    packed = all(any((f / f"{part}.tar.gz").is_file() for f in (folder, base)) for part in missing)
    return bool(missing) and (packed or download)


def provide(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
    download: bool = False,
    download_url: str = URL,
    archives_sha256: Mapping[str, str] | None = None,
) -> bool:
    """Unpack missing parts from ``PART.tar.gz`` in the root, downloaded before if need be.

    Args:
        root: the folder that holds the archives; with `download` it is made if need be.
        train_parts, valid_parts, test_parts: as of `utterances`.
        download: fetch archives that aren't there.
        download_url: the folder that holds them.
        archives_sha256: SHA-256 by part, of archives other than LibriSpeech's own.

    Returns:
        whether there was anything to unpack.

    Raises:
        DataError: an archive isn't what it should be, can't be fetched, or there is no room.
    """
    names = [*train_parts, *valid_parts, *test_parts]
    _check(names)
    if not root:
        return False
    folder = Path(root).expanduser()
    known = {part: published.sha256 for part, published in PUBLISHED.items()}
    known |= archives_sha256 or {}
    url = download_url if download else None

    def missing() -> tuple[Path, list[str]]:
        base = _base(folder, names)
        return base, _missing(base, names)

    return obtain(missing, folder, url=url, sha256=known)


def _check(parts: Sequence[str]) -> None:
    if twice := sorted({part for part in parts if parts.count(part) > 1}):
        raise DataError(f"part named twice: {', '.join(twice)}", where="data", do="name it once")
    if bad := [part for part in parts if Path(part).name != part]:
        raise DataError(
            f"not the name of a part: {bad[0]!r}",
            where="data",
            do="name folders under data.root, such as train-clean-100",
        )


def _base(root: Path, parts: Sequence[str]) -> Path:
    """The folder of the parts: the root, or ``LibriSpeech/`` in it, where archives unpack to."""
    inner = root / "LibriSpeech"
    for folder in (inner, root):
        if any((folder / part).is_dir() for part in parts):
            return folder
    return root if root.name == "LibriSpeech" and not inner.is_dir() else inner


def _missing(base: Path, parts: Sequence[str]) -> list[str]:
    return [part for part in parts if not (base / part).is_dir()]


def _part(base: Path, part: str, split: str) -> Iterator[Item]:
    # The part is what the user named, so a part that is itself a link is followed.
    inside = (base / part).resolve()
    for folder, names, links in walk(base / part):
        for name in links:
            yield Rejected(_relative(folder / name, base), None, FOLDER_LINK)
        audio, transcripts = _files(names)
        if not audio and not transcripts:
            continue
        texts: dict[str, str] = {}
        rejected: list[Rejected] = []
        for name in transcripts:
            path = folder / name
            if path.is_symlink() and (fault := unusable(path, inside)):
                rejected.append(Rejected(_relative(path, base), None, fault))
            else:
                rejected += _read_transcripts(path, _relative(path, base), texts)
        for id_ in sorted(texts.keys() | audio.keys()):
            for name in audio.get(id_, [""])[1:]:
                source = _relative(folder / name, base)
                reason = "duplicate id: a second file of that name"
                rejected.append(Rejected(source, id_, reason, split))
            if id_ not in audio:
                source = _relative(folder / id_, base)
                reason = "no audio file for this transcript"
                rejected.append(Rejected(source, id_, reason, split))
                continue
            path = folder / audio[id_][0]
            source = _relative(path, base)
            if path.is_symlink() and (fault := unusable(path, inside)):
                rejected.append(Rejected(source, id_, fault, split))
            elif id_ not in texts:
                rejected.append(Rejected(source, id_, NO_TRANSCRIPT, split))
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
        if not path.is_file():
            raise OSError("not a regular file")
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
