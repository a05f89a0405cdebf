"""``manifest.arrow``: the manifest as columns, mapped into memory and shared by all who read it.

The file is Arrow IPC, uncompressed, in batches of rows: what a process touches are pages of the
file, which the system keeps once for all processes and may drop. ``split`` and ``subset`` are codes
of a dictionary, so that choosing rows compares bytes; texts are looked at a row at a time.

Letters: N rows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from reproduce.data.corpora import SPLITS
from reproduce.records import MANIFEST_COLUMNS, SUBSETS

Positions = NDArray[np.int32]

ROWS_A_BATCH = 2**16
CODED: dict[str, Sequence[str]] = {"split": SPLITS, "subset": SUBSETS}
"""Columns of few values, which are stored as places in these lists."""
NUMBERS = {"seconds": pa.float64(), "samples": pa.int64(), "offset": pa.int64()}
SCHEMA = pa.schema(
    [
        pa.field(
            name,
            pa.dictionary(pa.int8(), pa.string())
            if name in CODED
            else NUMBERS.get(name, pa.string()),
            nullable=False,
        )
        for name in MANIFEST_COLUMNS
    ]
)


class ColumnsFile:
    """Writes ``manifest.arrow``, a row at a time.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._rows: list[Sequence[Any]] = []

    def add(self, row: Sequence[Any]) -> None:
        """A row: values in the order of `MANIFEST_COLUMNS`."""
        self._rows.append(row)
        if len(self._rows) == ROWS_A_BATCH:
            self._write()

    def add_all(self, rows: Rows) -> None:
        """All these rows."""
        self._writer.write_table(rows.table.combine_chunks(), ROWS_A_BATCH)

    def _write(self) -> None:
        columns = [_column(*both) for both in zip(SCHEMA.names, zip(*self._rows), strict=True)]
        self._writer.write_batch(pa.record_batch(columns, SCHEMA))
        self._rows.clear()

    def __enter__(self) -> ColumnsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            if self._rows:
                self._write()
            self._writer.close()
        self._sink.close()
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    if name not in CODED:
        return pa.array(values, SCHEMA.field(name).type)
    known = CODED[name]
    codes = pa.array([known.index(value) for value in values], pa.int8())
    return pa.DictionaryArray.from_arrays(codes, pa.array(known))


def map_columns(file: int) -> Rows:
    """The rows of an open ``manifest.arrow``; nothing is read yet.

    Raises:
        ValueError: it isn't one, or is cut.
    """
    mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all()
    if table.schema != SCHEMA:
        raise ValueError("it has other columns than a manifest")
    return Rows(table)


def read_csv(path: Path) -> Rows:
    """The rows of a ``manifest.csv``, in memory.

    Raises:
        ValueError: it isn't one.
        OSError: it can't be read.
    """
    from pyarrow import csv

    types = {name: NUMBERS.get(name, pa.string()) for name in MANIFEST_COLUMNS}
    try:
        table = csv.read_csv(
            path,
            convert_options=csv.ConvertOptions(
                include_columns=list(MANIFEST_COLUMNS),
                column_types=types,
                strings_can_be_null=False,  # a speaker or a transcript may be called "NA"
            ),
        )
    except KeyError as error:
        raise ValueError(f"a column is missing: {error}") from None
    columns = []
    for name in MANIFEST_COLUMNS:
        column = table[name]
        if name in CODED:
            unknown = set(column.unique().to_pylist()) - set(CODED[name])
            if unknown:
                raise ValueError(f"unknown {name}: {', '.join(map(repr, sorted(unknown)))}")
            column = pa.chunked_array(
                [_column(name, chunk.to_pylist()) for chunk in column.chunks],
                SCHEMA.field(name).type,
            )
        columns.append(column)
    return Rows(pa.table(columns, schema=SCHEMA))


class Rows:
    """Rows of a manifest, in its order: columns, and which rows of them.

    Args:
        table: with some or all columns of the manifest.
        positions: which rows, ascending; None: all.
    """

    def __init__(self, table: pa.Table, positions: Positions | None = None) -> None:
        self.table, self._positions = table, positions
        lengths = [len(chunk) for chunk in table.column(0).chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Rows:
        """Rows of a manifest that was never written: column name -> values."""
        return cls(pa.table({name: _column(name, values) for name, values in columns.items()}))

    def __len__(self) -> int:
        return self.table.num_rows if self._positions is None else len(self._positions)

    def array(self, column: str, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """A column of numbers, [N]; for a coded column the codes (`CODED`).

        Args:
            column: its name.
            dtype: what to make of it; None: as stored.
        """
        found: NDArray[Any] | None = None
        place = 0
        for _, chunk, own in self._chunks(column):
            stored = chunk.indices if column in CODED else chunk
            values = _view(stored)
            part = values if own is None else values[own]
            if found is None:
                found = np.empty(len(self), dtype or values.dtype)
            found[place : place + len(part)] = part
            place += len(part)
        return np.empty(0, dtype or np.int64) if found is None else found

    def strings(self, column: str) -> Strings:
        """A column of text, looked at when it is asked for."""
        return Strings(self, column)

    def at(self, column: str, index: int) -> Any:
        """One value: of row ``index`` of these rows."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index if self._positions is None else int(self._positions[index])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.table[column].chunk(part)[row - int(self._starts[part])].as_py()

    def take(self, chosen: NDArray[Any]) -> Rows:
        """Some of these rows.

        Args:
            chosen: places 0..N-1 in these rows, ascending.
        """
        chosen = np.asarray(chosen)
        if np.any(chosen[1:] <= chosen[:-1]):
            raise ValueError("rows are taken in their order")
        rows = chosen if self._positions is None else self._positions[chosen]
        return Rows(self.table, rows.astype(np.int32))

    def with_rows(self, others: Rows) -> Rows:
        """These rows and others of the same manifest, in its order."""
        every = np.arange(self.table.num_rows, dtype=np.int32)
        own, more = (every if r._positions is None else r._positions for r in (self, others))
        return Rows(self.table, np.union1d(own, more))

    def to_pandas(self) -> Any:
        """A DataFrame of these rows, to look at: it takes many times the memory."""
        table = self.table if self._positions is None else self.table.take(self._positions)
        texts = {name: pa.string() for name in CODED if name in table.column_names}
        fields = [pa.field(f.name, texts.get(f.name, f.type)) for f in table.schema]
        return table.cast(pa.schema(fields)).to_pandas()

    def _chunks(self, column: str) -> Iterator[tuple[int, pa.Array, NDArray[Any] | None]]:
        """Where each batch begins, its values, and which of them are these rows' (None: all)."""
        chunks = self.table[column].chunks
        if self._positions is None:
            yield from ((int(s), chunk, None) for s, chunk in zip(self._starts, chunks))
            return
        bounds = np.searchsorted(self._positions, self._starts)
        for start, chunk, first, last in zip(self._starts, chunks, bounds, bounds[1:]):
            if first < last:
                yield int(start), chunk, self._positions[first:last] - int(start)


def _view(numbers: pa.Array) -> NDArray[Any]:
    """An array without missing values, nothing copied (Arrow's own way would import pandas)."""
    dtype = np.dtype({"double": "float64"}.get(str(numbers.type), str(numbers.type)))
    if not len(numbers):
        return np.empty(0, dtype)
    _, values = numbers.buffers()
    return np.frombuffer(values, dtype, len(numbers), numbers.offset * dtype.itemsize)


class Strings(Sequence[str]):
    """A column of text: a sequence that makes its strings when they are asked for."""

    def __init__(self, rows: Rows, column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return str(self._rows.at(self._column, index + len(self) if index < 0 else index))

    def __iter__(self) -> Iterator[str]:
        for _, chunk, own in self._rows._chunks(self._column):
            yield from (chunk if own is None else chunk.take(pa.array(own))).to_pylist()
