"""The manifest as columns: what is written is what is read, whatever is chosen of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from reproduce.data import columns as module
from reproduce.data.columns import ColumnsFile, Rows, map_columns, read_csv
from reproduce.data.corpora import SPLITS
from reproduce.records import MANIFEST_COLUMNS, SUBSETS

TEXTS = [
    "NA",
    "null",
    'a "b", c',
    "a\u2028b",
    "مرحبا",
    "=1+1",
    "007",
    "nan",
    "true",
    " x",
    "'",
    "é",
]


def rows_of(count: int) -> list[tuple[Any, ...]]:
    lengths = np.random.default_rng(0).integers(1000, 600_000, count).tolist()
    ends = np.cumsum(lengths).tolist()
    return [
        (
            f"u{n}", "noise", SPLITS[n % 3], SUBSETS[n % 4], "NA" if n % 2 else "", length / 16000,
            length, end - length, TEXTS[n % len(TEXTS)], f"{n}.wav", f"{n:064x}",
        )
        for n, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]  # fmt: skip


@pytest.fixture(params=["arrow", "csv", "arrow of csv"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[Any, ...]], Rows]:
    """100 rows as they were given and as they are read, in several batches."""
    monkeypatch.setattr(module, "ROWS_A_BATCH", 7)
    given = rows_of(100)
    if "csv" in request.param:
        with open(tmp_path / "manifest.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(MANIFEST_COLUMNS)
            writer.writerows(given)
        read = read_csv(tmp_path / "manifest.csv")
        if request.param == "csv":
            return given, read
    with ColumnsFile(tmp_path / "manifest.arrow") as file:
        if request.param == "arrow":
            for row in given:
                file.add(row)
        else:
            file.add_all(read)
    with open(tmp_path / "manifest.arrow", "rb") as opened:
        mapped = map_columns(opened.fileno())
    assert mapped.table["id"].num_chunks == 15
    return given, mapped


def test_every_column_comes_back(both: tuple[list[tuple[Any, ...]], Rows]) -> None:
    given, rows = both
    assert len(rows) == 100
    for name, values in zip(MANIFEST_COLUMNS, zip(*given), strict=True):
        assert [rows.at(name, n) for n in range(100)] == list(values)
        if name in ("seconds", "samples", "offset"):
            assert rows.array(name).tolist() == list(values)
        elif name == "split":
            assert rows.array(name).tolist() == [SPLITS.index(v) for v in values]
        elif name == "subset":
            assert rows.array(name).tolist() == [SUBSETS.index(v) for v in values]
        else:
            assert list(rows.strings(name)) == list(values)
    frame = rows.to_pandas()
    assert tuple(frame.columns) == MANIFEST_COLUMNS
    assert list(frame.itertuples(index=False, name=None)) == given


@pytest.mark.parametrize(
    "chosen", [[0], [99], [6, 7, 8], [13, 14, 70], range(7, 14), range(100), []]
)
def test_rows_taken_and_taken_again(
    both: tuple[list[tuple[Any, ...]], Rows], chosen: list[int]
) -> None:
    given, rows = both
    expected = [given[n] for n in chosen]
    for taken in (
        rows.take(np.array(chosen, int)),
        rows.take(np.arange(0, 100)).take(np.array(chosen, int)),
    ):
        assert len(taken) == len(chosen)
        assert list(taken.strings("text")) == [row[8] for row in expected]
        assert taken.array("offset").tolist() == [row[7] for row in expected]
        samples = taken.array("samples", np.int32)
        assert samples.dtype == np.int32
        assert samples.tolist() == [row[6] for row in expected]
        assert [taken.strings("id")[n] for n in range(len(chosen))] == [row[0] for row in expected]
        assert taken.strings("id")[-2:] == [row[0] for row in expected[-2:]]
        assert list(taken.to_pandas()["id"]) == [row[0] for row in expected]
        with pytest.raises(IndexError):
            taken.at("id", len(chosen))


def test_rows_stay_in_their_order(both: tuple[list[tuple[Any, ...]], Rows]) -> None:
    _, rows = both
    for chosen in ([3, 2], [4, 4]):
        with pytest.raises(ValueError, match="in their order"):
            rows.take(np.array(chosen))


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"]})
    with pa.OSFile(str(tmp_path / "x"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    with open(tmp_path / "x", "rb") as opened, pytest.raises(ValueError, match="other columns"):
        map_columns(opened.fileno())
    good = ",".join(MANIFEST_COLUMNS)
    for text, problem in (
        ("id,corpus\n1,2\n", "a column is missing"),
        (f"{good}\na,c,dev,all,s,1.0,16000,0,T,x,0\n", "unknown split: 'dev'"),
        (f"{good}\na,c,train,2h,s,1.0,16000,0,T,x,0\n", "unknown subset: '2h'"),
        (f"{good}\na,c,train,all,s,1.0,many,0,T,x,0\n", "many"),
        ("", "[Ee]mpty"),
    ):
        (tmp_path / "manifest.csv").write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_csv(tmp_path / "manifest.csv")
