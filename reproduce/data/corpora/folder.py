"""Audio files with one table of transcripts: CSV, TSV (no quoting) or JSON lines.

Columns, by any of these names: ``path`` (``file``, ``file_name``, ``audio``), relative to the
corpus folder; ``text`` (``transcript``, ``transcription``, ``sentence``); and, where there are any,
``id``, ``speaker`` (``speaker_id``, ``client_id``) and ``split``. Without an id it is the path
without its suffix. Corpus order is the table's.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reproduce.data.corpora import Item, Rejected, Utterance
from reproduce.data.corpora.files import (
    AUDIO_SUFFIXES,
    FOLDER_LINK,
    OUTSIDE,
    FileAudio,
    corpus_root,
    unusable,
    walk,
)
from reproduce.errors import DataError, MissingCorpusError
from reproduce.position import derive_seed

COLUMNS = {
    "path": ("path", "file", "file_name", "audio"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "id": ("id",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
}
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip
SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass
class Row:
    """One row of the table; `fault` says why it can't be read."""

    number: int
    path: str = ""
    text: str = ""
    id: str = ""
    speaker: str = ""
    split: str = ""
    fault: str = ""


def utterances(
    *,
    root: Path | str | None = None,
    transcripts: Path | str | None = None,
    valid_fraction: float = 0.1,
) -> Iterator[Item]:
    """Utterances of the table, then a `Rejected` for each audio file it doesn't name.

    Args:
        root: the corpus folder.
        transcripts: the table; a relative path is looked up from here, then under the root. None:
            the only .csv, .tsv or .jsonl file in the root.
        valid_fraction: used where the table has no ``split`` column. Speakers, in the order of a
            hash of their names, go to validation until it has this share of the rows, so that no
            speaker is shared; with fewer than 2 / `valid_fraction` speakers, rows do, by a hash of
            their ids.

    Raises:
        DataError: the root or table is missing, ambiguous or unreadable, or a column is missing.
    """
    base = corpus_root(root, "folder")
    table = _table(base, transcripts)
    columns = _columns(table)
    validation: set[int] | None = None
    if "split" not in columns:
        validation, by_speaker = _validation(lambda: _rows(table, columns), valid_fraction)
    named: set[str] = set()
    for row in _rows(table, columns):
        if validation is not None:
            row.split = "valid" if _group(row, by_speaker) in validation else "train"
        item = _item(row, base, table.name)
        named.add(item.source)
        yield item
    for folder, names, links in walk(base):
        for name in links:
            yield Rejected((folder / name).relative_to(base).as_posix(), None, FOLDER_LINK)
        for name in names:
            source = (folder / name).relative_to(base).as_posix()
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and source not in named:
                yield Rejected(source, None, f"no transcript in {table.name}")


def _item(row: Row, base: Path, table: str) -> Item:
    split = SPLIT_NAMES.get(row.split.lower(), "")
    if row.fault or not row.path:
        reason = row.fault or "no audio file named"
        return Rejected(f"{table}: row {row.number}", row.id or None, reason, split)
    source = row.path
    try:
        if fault := unusable(base / row.path, base):
            return Rejected(source, row.id, fault, split)
        path = _existing(Path(os.path.normpath(base / row.path)))
        if not path.is_relative_to(base):  # an absolute path, through links to the folder
            path = path.parent.resolve() / path.name
        if not path.is_relative_to(base):
            return Rejected(source, row.id, OUTSIDE, split)
        source = path.relative_to(base).as_posix()
        if not path.is_file():
            reason = "not a file" if path.exists() else "no such audio file"
            return Rejected(source, row.id, reason, split)
    except (OSError, ValueError, RuntimeError) as error:
        return Rejected(source, row.id, f"not a usable path: {error}", split)
    if not split:
        return Rejected(source, row.id, f"unknown split: {row.split!r}, not train, valid or test")
    return Utterance(row.id, split, row.speaker, row.text, source, FileAudio(path))


def _existing(path: Path) -> Path:
    """The path, or the same name in another normal form: tables and file systems differ in it."""
    if not path.exists() and not str(path).isascii():
        for form in ("NFC", "NFD"):
            other = path.parent / unicodedata.normalize(form, path.name)
            if other.exists():
                return other
    return path


def _validation(rows: Callable[[], Iterable[Row]], valid_fraction: float) -> tuple[set[int], bool]:
    """Groups of rows that validate, and whether rows are grouped by speaker; see `utterances`."""
    speakers: set[str] = set()
    total = 0
    for row in rows():
        speakers.add(row.speaker)
        total += 1
    by_speaker = valid_fraction > 0 and len(speakers - {""}) >= 2 / valid_fraction
    wanted = round(valid_fraction * total)
    if valid_fraction > 0 and total > 1:
        wanted = max(wanted, 1)
    sizes = Counter(_group(row, by_speaker) for row in rows())
    chosen = set()
    for group in sorted(sizes):
        if wanted <= 0:
            break
        wanted -= sizes[group]
        chosen.add(group)
    return chosen, by_speaker


def _group(row: Row, by_speaker: bool) -> int:
    name = (row.speaker if by_speaker else "") or row.id
    return derive_seed(0, "valid", name.encode("utf-8", "backslashreplace").decode())


def _table(base: Path, transcripts: Path | str | None) -> Path:
    if transcripts:
        given = Path(transcripts).expanduser()
        for path in (given, base / given):
            if path.is_file():
                break
        else:
            raise MissingCorpusError(
                "no such file",
                where=str(given),
                do="set data.transcripts to the table of transcripts",
            )
    else:
        found = sorted(p for p in base.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"one table of transcripts expected (.csv, .tsv or .jsonl), found: {names}",
                where=str(base),
                do="name it: --set data.transcripts=FILE",
            )
        path = found[0]
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"not a table of transcripts: {' or '.join(SUFFIXES)} expected",
            where=str(path),
            do="set data.transcripts to the table of transcripts",
        )
    return path


def _columns(table: Path) -> dict[str, str]:
    """Our columns -> the table's. Reads it to the end, so that later readings meet no error.

    Raises:
        DataError: it can't be read, or has no column for the path or the text.
    """
    names: set[str] = set()
    try:
        for record in _records(table):
            if isinstance(record, dict):
                names |= record.keys()
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't be read: {error}",
            where=str(table),
            do="it must be UTF-8: CSV or TSV with a header line, or one JSON object a line",
        ) from None
    columns = {
        ours: alias
        for ours, aliases in COLUMNS.items()
        if (alias := next((alias for alias in aliases if alias in names), None))
    }
    missing = [" or ".join(COLUMNS[name]) for name in ("path", "text") if name not in columns]
    if missing:
        raise DataError(
            f"no column {', and no column '.join(missing)}; "
            f"its columns: {', '.join(sorted(names)) or 'none'}",
            where=str(table),
            do=f"rename the column{'s' * (len(missing) > 1)}, or add a header line",
        )
    return columns


def _rows(table: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    records = _records(table)
    if table.suffix.lower() != ".jsonl":
        next(records, None)  # the header
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            yield Row(number, fault=record)
            continue
        row = Row(number, **{ours: record.get(alias, "") for ours, alias in columns.items()})
        row.id = row.id or os.path.splitext(row.path)[0]
        yield row


Record = dict[str, str] | str
"""Lower-case column -> value, or what is wrong with the row."""


def _records(table: Path) -> Iterator[Record]:
    """Rows; of a CSV or TSV the header first, each name with itself.

    Raises:
        OSError, ValueError: it can't be read; names the line.
    """
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table.suffix.lower() == ".jsonl":
            yield from map(_json_record, filter(str.strip, _lines(file)))
        else:
            yield from _csv_records(_lines(file), tabs=table.suffix.lower() == ".tsv")


def _lines(file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            line.encode()
        except UnicodeEncodeError:  # an escaped byte
            raise ValueError(f"line {number} isn't UTF-8") from None
        yield line


def _csv_records(lines: Iterable[str], *, tabs: bool) -> Iterator[Record]:
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader(lines, strict=True)
    )
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {first}: {error}") from None
        if cells is None:
            break
        if header is None:
            header = [name.strip().lower() for name in cells]
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise ValueError(f"line {first} names the column {twice[0]!r} twice")
            yield {name: name for name in header}
        elif any("\n" in cell or "\r" in cell for cell in cells):
            yield (
                f"a cell holds a line break: lines {first} to {reader.line_num}; close its quote, "
                "or write one line an utterance"
            )
        elif len(cells) > len(header):
            yield f"too many fields: {len(cells)} in a table of {len(header)} columns, line {first}"
        elif cells:
            yield {name: cell.strip() for name, cell in zip(header, cells)}


def _json_record(line: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return "not a JSON object"
    values = {key.strip().lower(): value for key, value in record.items()}
    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    if bad := sorted(k for k, v in values.items() if k in known and isinstance(v, dict | list)):
        return f"{', '.join(bad)}: text expected"
    return {k: str(v).strip() if k in known and v is not None else "" for k, v in values.items()}
