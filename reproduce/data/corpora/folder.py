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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reproduce.data.corpora import Item, Rejected, Utterance
from reproduce.data.corpora.files import AUDIO_SUFFIXES, FileAudio, corpus_root, leaves, walk
from reproduce.errors import DataError
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
    columns, rows = _read(table)
    if "split" not in columns:
        _split(rows, valid_fraction)
    named: set[str] = set()
    for row in rows:
        item = _item(row, base, table.name)
        named.add(item.source)
        yield item
    for folder, names in walk(base):
        for name in names:
            source = (folder / name).relative_to(base).as_posix()
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and source not in named:
                yield Rejected(source, None, f"no transcript in {table.name}")


def _item(row: Row, base: Path, table: str) -> Item:
    if row.fault or not row.path:
        reason = row.fault or "no audio file named"
        return Rejected(f"{table}: row {row.number}", row.id or None, reason)
    source = row.path
    try:
        path = Path(os.path.normpath(base / row.path))
        if leaves(base / row.path, base) or not path.is_relative_to(base):
            return Rejected(source, row.id, "path leaves the corpus folder")
        source = path.relative_to(base).as_posix()
        if not path.is_file():
            return Rejected(source, row.id, "no such audio file")
    except (OSError, ValueError, RuntimeError) as error:
        return Rejected(source, row.id, f"not a usable path: {error}")
    split = SPLIT_NAMES.get(row.split.lower())
    if split is None:
        return Rejected(source, row.id, f"unknown split {row.split!r}: train, valid or test")
    return Utterance(row.id, split, row.speaker, row.text, source, FileAudio(path))


def _split(rows: list[Row], valid_fraction: float) -> None:
    """Fill in ``split``; see `utterances`."""
    speakers = {row.speaker for row in rows} - {""}
    by_speaker = valid_fraction > 0 and len(speakers) >= 2 / valid_fraction
    groups: dict[str, list[Row]] = {}
    for row in rows:
        row.split = "train"
        groups.setdefault((row.speaker if by_speaker else "") or row.id, []).append(row)
    wanted = round(valid_fraction * len(rows))
    if valid_fraction > 0 and len(rows) > 1:
        wanted = max(wanted, 1)
    for key in sorted(groups, key=lambda key: derive_seed(0, "valid", key)):
        if wanted <= 0:
            break
        wanted -= len(groups[key])
        for row in groups[key]:
            row.split = "valid"


def _table(base: Path, transcripts: Path | str | None) -> Path:
    if transcripts:
        given = Path(transcripts).expanduser()
        for path in (given, base / given):
            if path.is_file():
                break
        else:
            raise DataError(
                "no such file",
                where=str(given),
                do="set data.transcripts to the table of transcripts",
            )
    else:
        found = sorted(path for path in base.iterdir() if path.suffix.lower() in SUFFIXES)
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


def _read(table: Path) -> tuple[set[str], list[Row]]:
    """Our columns that the table has, and its rows.

    Raises:
        DataError: it can't be read, or has no column for the path or the text.
    """
    jsonl = table.suffix.lower() == ".jsonl"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if jsonl:
                names, records = _json_records(file)
            else:
                names, records = _csv_records(file, tabs=table.suffix.lower() == ".tsv")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
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
    for needed in ("path", "text"):
        if needed not in columns:
            raise DataError(
                f"no column {' or '.join(COLUMNS[needed])}; "
                f"its columns: {', '.join(sorted(names)) or 'none'}",
                where=str(table),
                do="rename the column, or add a header line",
            )
    rows = []
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            rows.append(Row(number, fault=record))
            continue
        row = Row(number, **{ours: record.get(alias, "") for ours, alias in columns.items()})
        row.id = row.id or os.path.splitext(row.path)[0]
        rows.append(row)
    return set(columns), rows


Records = list[dict[str, str] | str]
"""Lower-case column -> value, or what is wrong with the row."""


def _csv_records(lines: Iterable[str], *, tabs: bool) -> tuple[set[str], Records]:
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader(lines, strict=True)
    )
    header = [name.strip().lower() for name in next(reader, [])]
    records: Records = []
    for cells in reader:
        if len(cells) > len(header):
            records.append(f"{len(cells)} fields in a table of {len(header)} columns")
        elif cells:
            records.append({name: cell.strip() for name, cell in zip(header, cells)})
    return set(header), records


def _json_records(lines: Iterable[str]) -> tuple[set[str], Records]:
    names: set[str] = set()
    records: Records = []
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            records.append(f"not JSON: {error}")
            continue
        if not isinstance(record, dict):
            records.append("not a JSON object")
            continue
        values = {key.strip().lower(): value for key, value in record.items()}
        names |= values.keys()
        if nested := [key for key, value in values.items() if isinstance(value, dict | list)]:
            known = {alias for aliases in COLUMNS.values() for alias in aliases}
            if bad := sorted(known.intersection(nested)):
                records.append(f"{', '.join(bad)}: text expected")
                continue
        records.append({k: "" if v is None else str(v).strip() for k, v in values.items()})
    return names, records
