"""Audio files with one table of transcripts: CSV, TSV or JSON lines; a line an utterance.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.data.corpora import DRAWN, Item, Rejected, Utterance
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
        valid_fraction: share of validation, drawn where the table has no ``split`` column
            (`reproduce.data.splits`).

    Raises:
        DataError: the root or table is missing, ambiguous or unreadable, or a column is missing.
    """
    base = corpus_root(root, "folder")
    table = _table(base, transcripts)
    columns = _columns(table)
    drawn = f"{DRAWN} {valid_fraction}"
    named: set[str] = set()
    for row in _rows(table, columns):
        split = SPLIT_NAMES.get(row.split.lower(), "") if "split" in columns else drawn
        item = _item(row, split, base, table.name)
        named.add(item.source)
        yield item
    for folder, names, links in walk(base):
        for name in links:
            yield Rejected((folder / name).relative_to(base).as_posix(), None, FOLDER_LINK)
        for name in names:
            source = (folder / name).relative_to(base).as_posix()
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and source not in named:
                yield Rejected(source, None, f"no transcript in {table.name}")


def _item(row: Row, split: str, base: Path, table: str) -> Item:
    if row.fault or not row.path:
        reason = row.fault or "no audio file named"
        named = row.path or f"{table}: row {row.number}"
        return Rejected(named, row.id or None, reason, split)
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
    """Our columns -> the table's. Reads it to the end: JSON lines name them wherever they stand.

    Raises:
        DataError: it can't be read, or has no column for the path or the text.
    """
    names: set[str] = set()
    try:
        for record in _records(table):
            if isinstance(record, dict):
                names |= record.keys()
    except OSError as error:
        raise DataError(
            f"can't be read: {error.strerror}", where=str(table), do="make it readable"
        ) from None
    except _TableError as error:
        raise DataError(f"can't be read: {error}", where=str(table), do=error.do) from None
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
        row = Row(number)
        if isinstance(record, str):
            row.fault = record
        else:
            for ours, alias in columns.items():
                try:
                    setattr(row, ours, _text(ours, record.get(alias)))
                except ValueError as error:
                    row.fault = row.fault or str(error)
        row.id = row.id or os.path.splitext(row.path)[0]
        yield row


Record = dict[str, Any] | str
"""Lower-case column -> value, or what is wrong with the row."""


class _TableError(ValueError):
    """The whole table can't be read; what, and what to do."""

    def __init__(self, found: str, do: str) -> None:
        super().__init__(found)
        self.do = do


def _records(table: Path) -> Iterator[Record]:
    """Rows; of a CSV or TSV the header first, each name with itself. A row is one line, so that a
    bad one is lost alone.

    Raises:
        OSError, _TableError: it can't be read.
    """
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table.suffix.lower() == ".jsonl":
            yield from map(_json_record, filter(str.strip, file))
        else:
            yield from _cell_records(file, _tsv_cells if table.suffix.lower() == ".tsv" else _cells)


def _cell_records(lines: Iterable[str], cells_of: Callable[[str], list[str]]) -> Iterator[Record]:
    header: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip("\r\n"):
            continue
        try:
            cells = cells_of(line)
        except ValueError as error:
            kind, _, details = str(error).partition(": ")
            fault = f"{kind}: line {number}, {details}"
            if header is None:
                raise _TableError(fault, "mend its header line") from None
            yield fault
            continue
        if header is None:
            header = [name.strip().lower() for name in cells]
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise _TableError(
                    f"line {number} names the column {twice[0]!r} twice",
                    "rename one of them in its header line",
                )
            yield {name: name for name in header}
        elif len(cells) > len(header):
            yield (
                f"too many fields: {len(cells)} in a table of {len(header)} columns, line {number}"
            )
        else:
            yield {name: cell.strip() for name, cell in zip(header, cells)}


def _cells(line: str, delimiter: str = ",") -> list[str]:
    """A line of a CSV.

    Raises:
        ValueError: it can't be read; a reason.
    """
    _check_utf8(line)
    advice = "write a quote within a cell twice and the cell in quotes, an utterance a line"
    if line.count('"') % 2:
        raise ValueError(f"broken quotes: one of them stands alone; {advice}")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        if "expected after" in str(error):
            raise ValueError(f"broken quotes: text behind a closing one; {advice}") from None
        raise ValueError(f"unreadable line: {error}") from None


def _tsv_cells(line: str) -> list[str]:
    """A line of a TSV, which has no quoting; where all the same it was written with that of a CSV,
    as a first cell in quotes or a doubled quote within a quoted cell shows, that is taken off."""
    _check_utf8(line)
    cells = line.rstrip("\r\n").split("\t")
    if _quoted(cells[0]) or any(_quoted(cell) and '""' in cell[1:-1] for cell in cells):
        with suppress(ValueError):
            return _cells(line, "\t")
    return cells


def _quoted(cell: str) -> bool:
    """In quotes, and the ones within doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _check_utf8(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:  # an escaped byte
        raise ValueError("not UTF-8: save the table in this encoding") from None


class _Object(dict[str, Any]):
    """A JSON object, its keys in lower case; `twice` is one that it has twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        names = [name.strip().lower() for name, _ in pairs]
        super().__init__(zip(names, (value for _, value in pairs)))
        self.twice = next((name for name in names if names.count(name) > 1), None)


def _json_record(line: str) -> Record:
    try:
        _check_utf8(line)
        record = json.loads(line, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        return str(error) if str(error).startswith("not UTF-8") else f"not JSON: {error}"
    if not isinstance(record, _Object):
        return "not a JSON object"
    if record.twice is not None:
        return f"the same key twice: {record.twice!r}"
    return record


def _text(ours: str, value: Any) -> str:
    """The value of a column; ids and speakers may be whole numbers.

    Raises:
        ValueError: it is something else than text; a reason.
    """
    if value is None:
        return ""
    number = isinstance(value, int) and not isinstance(value, bool)
    if not (isinstance(value, str) or (number and ours in ("id", "speaker"))):
        shown = json.dumps(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise ValueError(f"text expected: {ours} is {shown}; write it in quotes, or leave it out")
    return str(value).strip()
