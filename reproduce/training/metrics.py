"""metrics.csv without a gap or a repeat, and sums that become means once."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from reproduce.errors import DataError
from reproduce.training.curves import Curves

Row = Mapping[str, float | int | str | None]


class MetricsFile:
    """One run's metrics.csv: appended row by row, cut back to a known row when resuming.

    Args:
        curves: event files that are to hold the same.
    """

    def __init__(self, path: Path, columns: Sequence[str], curves: Curves | None = None) -> None:
        self.path, self.columns, self.curves = path, tuple(columns), curves
        self.size = 0

    def restart(self, size: int = 0) -> None:
        """Keep the first ``size`` bytes (a checkpoint's), or begin anew with the header.

        Raises:
            DataError: the file is shorter than when the checkpoint was made.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if size:
            have = self.path.stat().st_size if self.path.exists() else 0
            if have < size:
                raise DataError(
                    f"{have} bytes, but {size} when its checkpoint was made: rows are missing",
                    where=str(self.path),
                    do="put the file back, or delete its folder to train this run anew",
                )
            os.truncate(self.path, size)
            self.size = size
        else:
            with open(self.path, "w", encoding="utf-8", newline="") as file:
                file.write(",".join(self.columns) + "\n")
                self.size = file.tell()
        if self.curves is not None:
            self.curves.restart(self.path)

    def append(self, row: Row) -> None:
        """Add a row; missing columns and None stay empty, NaN is written as ``nan``."""
        unknown = row.keys() - set(self.columns)
        if unknown:
            raise KeyError(f"not a column of {self.path.name}: {sorted(unknown)}")
        text = io.StringIO()
        cells = {name: format_value(row.get(name)) for name in self.columns}
        csv.writer(text, lineterminator="\n").writerow(cells.values())
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()
        if self.curves is not None:
            self.curves.append(cells)


def format_value(value: float | int | str | None) -> str:
    """A cell: floats to 9 significant digits, enough to tell float32 values apart."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else str(value)
    return str(value)


class Means:
    """Sums and counts by name since the last row; a mean is their quotient."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """Name -> mean, of everything counted at least once."""
        return {name: self.sums[name] / n for name, n in self.counts.items() if n > 0}

    def clear(self) -> None:
        self.sums.clear()
        self.counts.clear()

    def state(self) -> dict[str, dict[str, float]]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
