"""A small copy of a work folder's runs, from which a report makes the same page again.

Metrics, records and the codes' statistics; no weights, codebooks, checkpoints or audio, and no
places on the machine. So it can be committed beside the page.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from reproduce.errors import UsageError
from reproduce.records import METRIC_COLUMNS, RunFolder, WorkFolder, write_bytes, write_text
from reproduce.report.measured import Run, Work, speakers
from reproduce.report.privacy import without_paths

FOLDER = "runs"
_ABOUT = "README.md"
_TITLE = "# Kept runs\n"
_README = f"""{_TITLE}
Of every run `metrics.csv`, `run.json` and, in `codes.npz`, the statistics of its codes: what a
report reads, no weights. `w2vrep report --work runs --out .` in the folder above makes its page
again.
"""
_UNREADABLE = "can't be read where it was kept from\n"


def require_place(root: Path, out: Path) -> None:
    """Look whether ``out/runs`` may be written, in place of an earlier copy there.

    Args:
        root: the work folder.
        out: the folder of the report.

    Raises:
        UsageError: it is there and wasn't written by `keep_runs`, or is ``root``.
    """
    target = WorkFolder(out / FOLDER)
    if target.root.resolve() == Path(root).resolve():
        raise UsageError(
            "these runs are the kept ones already", where=str(root), do="leave out --keep-runs"
        )
    if target.root.exists():
        about = target.root / _ABOUT
        if not (about.is_file() and about.read_text(encoding="utf-8").startswith(_TITLE)):
            raise UsageError(
                "a folder that no --keep-runs wrote is in the way",
                where=str(target.root),
                do="give another --out",
            )


def keep_runs(work: Work, out: Path) -> None:
    """Write ``out/runs``, which isn't there yet."""
    target = WorkFolder(out / FOLDER)
    recipe = _private(dict(work.recipe) | {"name": work.name})
    write_text(target.root / _ABOUT, _README)
    write_text(target.recipe, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    if work.data:
        kept = {key: work.data[key] for key in ("subsets",) if key in work.data}
        if voices := speakers(work.data):
            kept["speakers"] = voices  # how many, not who
        write_text(target.summary, json.dumps(_private(kept), indent=1) + "\n")
    for (stage, arm, seed), run in work.runs.items():
        _keep(run, target.run(stage, arm, seed))


def _keep(run: Run, folder: RunFolder) -> None:
    folder.root.mkdir(parents=True)
    if run.folder.record.is_file():
        write_text(folder.record, _record(run))
    if run.folder.metrics.is_file():
        readable = run.metrics or "metrics.csv" not in run.problem
        write_text(folder.metrics, _metrics(run) if readable else _UNREADABLE)
    codes = run.codes
    if codes.problem:
        write_text(folder.codes, _UNREADABLE)
    elif codes.arrays:
        kept: dict[str, Any] = {name: _small(array) for name, array in codes.arrays.items()}
        if codes.width is not None:
            kept["width"] = np.array(codes.width)
        content = io.BytesIO()
        np.savez_compressed(content, **kept)
        write_bytes(folder.codes, content.getvalue())


def _record(run: Run) -> str:
    """Its JSON, with all its keys but without places on the machine."""
    if run.record is None:
        return _UNREADABLE
    raw = json.loads(run.folder.record.read_text(encoding="utf-8"))
    return json.dumps(_private(raw), separators=(",", ":")) + "\n"


def _metrics(run: Run) -> str:
    """Every row as it was read: without what was written twice or cut off."""
    names = METRIC_COLUMNS[run.folder.stage]
    rows = [
        (update, order, split, row)
        for order, (split, columns) in enumerate(run.metrics.items())
        for row, update in enumerate(columns["update"])
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for _, _, split, row in sorted(rows):
        writer.writerow(
            split if name == "split" else _number(float(run.metrics[split][name][row]))
            for name in names
        )
    return text.getvalue()


def _number(value: float) -> str:
    """The shortest text that reads as the same number; empty if there is none."""
    if np.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def _small(array: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, Any]:
    """Counts as whole numbers, which are a fraction of the size compressed."""
    whole = np.isfinite(array).all() and (array == np.rint(array)).all()
    return array.astype(np.int64) if whole and np.abs(array).max() < 2**53 else array


def _private(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_private(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value
