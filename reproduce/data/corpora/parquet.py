"""Parquet shards in the Hugging Face layout: a row an utterance, its audio file in a column.

Columns: ``audio`` (a struct with ``bytes``, a whole audio file, and maybe ``path``), ``text``
(``transcript``, ``transcription``, ``sentence``) and, where there are any, ``id``, ``speaker_id``
(``speaker``, ``client_id``). Without an id it is the audio's path without its suffix, or shard and
row. Texts are strings (or a dictionary of them) or bytes in UTF-8. Corpus order is that of the
parts as given, of the shards' names, and of the rows: the order that the study's permutation acts
on. An id met again in a later part is written ``PART/ID``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.data.audio import AudioError, Decoded
from reproduce.data.corpora import AudioSource, Item, Rejected, Utterance, in_parts
from reproduce.data.corpora.files import AUDIO_SUFFIXES, OUTSIDE, BytesAudio, corpus_root, unusable
from reproduce.errors import DataError, MissingCorpusError

COLUMNS = {
    "text": ("text", "transcript", "transcription", "sentence"),
    "id": ("id",),
    "speaker": ("speaker_id", "speaker", "client_id"),
}
TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
HUB_NAMES = {
    "train-clean-100": ("clean/train.100", "all/train.clean.100"),
    "train-clean-360": ("clean/train.360", "all/train.clean.360"),
    "train-other-500": ("other/train.500", "all/train.other.500"),
    "dev-clean": ("clean/validation", "all/validation.clean"),
    "dev-other": ("other/validation", "all/validation.other"),
    "test-clean": ("clean/test", "all/test.clean"),
    "test-other": ("other/test", "all/test.other"),
}
"""LibriSpeech's parts -> their folders in the data set ``librispeech_asr`` of the hub."""

OUTSIDE_SHARDS = "an audio file beside the shards: only what is in them is read"

BATCH = 16
"""Rows read at a time."""
SAMPLED = 32
"""Shards whose first rows tell how long an utterance is."""


def utterances(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
) -> Iterator[Item]:
    """Utterances of the named parts.

    Args:
        root: the folder of the data set.
        train_parts, valid_parts, test_parts: each a folder of shards under the root, a shard, a
            pattern such as ``data/train-*.parquet``, or a part of LibriSpeech by its own name.

    Raises:
        MissingCorpusError: the root or a part is missing.
        DataError: a shard can't be read or lacks a column.
    """
    base = corpus_root(root, "parquet")
    splits = {"train": train_parts, "valid": valid_parts, "test": test_parts}
    found = [
        (split, part, _shards(base, part)) for split, parts in splits.items() for part in parts
    ]

    listed: set[Path] = set()

    def items(shards: list[Path], split: str) -> Iterator[Item]:
        for shard in shards:
            yield from _shard(shard, base, split)
        for folder in sorted({shard.parent for shard in shards} - listed):
            listed.add(folder)
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in AUDIO_SUFFIXES:
                    yield Rejected(path.relative_to(base).as_posix(), None, OUTSIDE_SHARDS)

    yield from in_parts((part, items(shards, split)) for split, part, shards in found)


def hours(
    *,
    root: Path | str | None = None,
    train_parts: Sequence[str] = ("train-clean-100",),
    valid_parts: Sequence[str] = ("dev-clean",),
    test_parts: Sequence[str] = (),
) -> float:
    """About: rows times the mean length of the first ones of some shards."""
    base = corpus_root(root, "parquet")
    parts = [*train_parts, *valid_parts, *test_parts]
    shards = [shard for part in parts for shard in _shards(base, part)]
    rows, seconds = 0, list[float]()
    for number, shard in enumerate(shards):
        with _reading(shard) as file:
            rows += file.metadata.num_rows
            if number * SAMPLED // len(shards) != (number - 1) * SAMPLED // len(shards):
                _columns(file, shard)
                for batch in file.iter_batches(2 * BATCH, columns=["audio.bytes"]):
                    for audio in batch.column(0).to_pylist():
                        seconds.append(0.0)  # what can't be used takes no room
                        with suppress(AudioError):
                            data = (audio or {}).get("bytes") or b""
                            seconds[-1] = BytesAudio(data).seconds()
                    break
    return rows * sum(seconds) / max(len(seconds), 1) / 3600


def _shards(base: Path, part: str) -> list[Path]:
    """Files of a part, in the order of their names."""
    if Path(part).is_absolute() or ".." in Path(part).parts:
        raise DataError(
            f"not the name of a part: {part!r}",
            where="data",
            do="name folders, files or patterns under data.root, such as data/train-*.parquet",
        )
    for name in (part, *HUB_NAMES.get(part, ())):
        path = base / name
        if path.is_file():
            return [path]
        shards = path.glob("*.parquet") if path.is_dir() else base.glob(name)
        if found := sorted(shard for shard in shards if shard.is_file()):
            return found
    folders = {path.parent.relative_to(base).as_posix() for path in base.rglob("*.parquet")}
    raise MissingCorpusError(
        f"no shards of part {part}; folders with shards: {', '.join(sorted(folders)) or 'none'}",
        where=str(base),
        do="name folders, files or patterns under data.root in data.train_parts and valid_parts",
    )


def _shard(shard: Path, base: Path, split: str) -> Iterator[Item]:
    name = shard.relative_to(base).as_posix()
    # A hub cache holds links to the folder blobs/ beside snapshots/.
    cache = base.parent.parent / "blobs" if base.parent.name == "snapshots" else base
    if unusable(shard, base) and unusable(shard, cache):
        yield Rejected(name, None, OUTSIDE)
        return
    status = shard.stat()
    stamp = f"{status.st_size}:{status.st_mtime_ns}"
    number = 0
    with _reading(shard) as file:
        columns = _columns(file, shard)
        for group in range(file.num_row_groups):
            first = number
            wanted = list(columns.values())
            for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                texts = {ours: _texts(batch, theirs) for ours, theirs in columns.items()}
                for row in range(len(batch)):
                    values = {ours: column[row] for ours, column in texts.items()}
                    path = values.get("path") or ""
                    id_ = values.get("id") or os.path.splitext(path)[0] or f"{name}-{number}"
                    source = f"{name}#{number}"
                    if bad := [ours for ours, value in values.items() if value is None]:
                        what = "transcript" if bad[0] == "text" else bad[0]
                        yield Rejected(source, id_, f"{what} isn't UTF-8", split)
                    else:
                        yield Utterance(
                            id_, split, values.get("speaker") or "", values["text"] or "", source,
                            ShardAudio(shard, group, number - first, stamp),
                        )  # fmt: skip
                    number += 1


def _texts(batch: Any, column: str) -> list[str | None]:
    """A column of a batch, or a field of one (``audio.path``): None for what isn't UTF-8."""
    import pyarrow as pa
    import pyarrow.compute as pc

    name, _, field = column.partition(".")
    values = batch.column(name)
    if field:
        values = pc.struct_field(values, field)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not _is_text(values.type):
        return ["" if value is None else str(value) for value in values.to_pylist()]
    return [_decoded(value) for value in values.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | None:
    try:
        return "" if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in TEXT_TYPES


def _columns(file: Any, shard: Path) -> dict[str, str]:
    """Ours -> theirs, ``path`` -> ``audio.path`` if there is one.

    Raises:
        DataError: one is missing, or of a type that can't be read.
    """
    import pyarrow as pa

    schema = file.schema_arrow
    columns = {
        ours: next(alias for alias in aliases if alias in schema.names)
        for ours, aliases in COLUMNS.items()
        if any(alias in schema.names for alias in aliases)
    }
    audio = schema.field("audio").type if "audio" in schema.names else None
    fields = {f.name: f.type for f in audio} if audio and pa.types.is_struct(audio) else {}
    missing = "" if "bytes" in fields else "audio with the audio file's bytes"
    missing = missing or ("" if "text" in columns else " or ".join(COLUMNS["text"]))
    do = "shards in the layout of the Hugging Face hub are needed, audio embedded"
    if missing:
        raise DataError(
            f"no column {missing}; its columns: {', '.join(schema.names)}", where=str(shard), do=do
        )
    kinds = {theirs: schema.field(theirs).type for theirs in columns.values()}
    kinds["audio.bytes"] = fields["bytes"]
    if "path" in fields:
        columns["path"], kinds["audio.path"] = "audio.path", fields["path"]
    for column, kind in kinds.items():
        number = pa.types.is_integer(kind) and column in (columns.get("id"), columns.get("speaker"))
        if not (_is_text(kind) or pa.types.is_null(kind) or number):
            raise DataError(f"column {column} holds {kind}, not text", where=str(shard), do=do)
    return columns


@contextmanager
def _reading(shard: Path) -> Iterator[Any]:
    """The open shard; its errors become ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered: memory is that of a page, not of a row group.
        with pq.ParquetFile(shard, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"can't be read: {reason}", where=str(shard), do="fetch this shard anew"
        ) from None


@dataclass(frozen=True)
class ShardAudio(AudioSource):
    """The audio file in one row of a shard."""

    shard: Path
    group: int
    row: int
    version: str

    def fetch(self) -> BytesAudio:
        """Read it; cheap where rows are asked for in order, as packing does."""
        return BytesAudio(_reader.read(self.shard, self.group, self.row))

    def load(self) -> Decoded:
        return self.fetch().load()

    def seconds(self) -> float:
        return self.fetch().seconds()

    def stamp(self) -> str:
        return self.version


class _Reader:
    """Reads on in a row group, a batch of rows at a time."""

    def __init__(self) -> None:
        self._place: tuple[Path, int] | None = None
        self._rows: Iterator[bytes] = iter(())
        self._next = 0

    def read(self, shard: Path, group: int, row: int) -> bytes:
        if self._place != (shard, group) or row < self._next:
            self._rows, self._next, self._place = _audio(shard, group), 0, (shard, group)
        try:
            for data in self._rows:
                self._next += 1
                if self._next > row:
                    return data
        except BaseException:
            self._place = None
            raise
        raise DataError(
            f"row group {group} has no row {row}", where=str(shard), do="fetch this shard anew"
        )


_reader = _Reader()


def _audio(shard: Path, group: int) -> Iterator[bytes]:
    with _reading(shard) as file:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=["audio.bytes"]):
            for audio in batch.column(0).to_pylist():
                yield (audio or {}).get("bytes") or b""
