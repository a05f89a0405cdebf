"""The measured side: every run of a work folder, finished or not, and what its recipe planned.

Reading forgives what happens to real runs (no record yet, a line cut off, NaN, rows written twice
after a continuation); it never invents a value.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from reproduce.errors import DataError
from reproduce.records import METRIC_COLUMNS, RunFolder, RunRecord, Stage, WorkFolder
from reproduce.report.codes import Codes, read_codes
from reproduce.report.privacy import without_paths
from reproduce.report.statistics import Curve, Floats

LOSS: dict[Stage, str] = {"pretrain": "contrastive_loss", "finetune": "ctc_loss"}
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")

Columns = dict[str, Floats]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """One run: its record if there is one, its metrics as far as they can be read.

    ``suspect`` says why it can't be the run that its folder's name says, if so: it isn't counted.
    """

    folder: RunFolder
    record: RunRecord | None
    metrics: dict[str, Columns]
    """split -> column -> values [N]; NaN where nothing was measured."""
    problem: str = ""
    suspect: str = ""

    @property
    def status(self) -> str:
        return self.record.status if self.record else "no record"

    @property
    def outcome(self) -> str:
        return self.record.outcome if self.record else ""

    @cached_property
    def codes(self) -> Codes:
        """Statistics of its codebooks, as far as ``codes.npz`` can be read."""
        return read_codes(self.folder.codes, self.folder.stage)

    @property
    def counted(self) -> bool:
        """Whether tables and claims use it: finished, not diverged, and the run it says it is."""
        return self.status == "finished" and self.outcome != "diverged" and not self.suspect

    @property
    def without_loss(self) -> list[str]:
        """The splits, ``train`` or ``valid``, whose last loss is missing or not finite."""
        loss = LOSS[self.folder.stage]
        return [split for split in ("train", "valid") if self.final(split, loss) is None]

    def final(self, split: str, column: str) -> float | None:
        """The last value, as the record has it, or else the last row of the metrics."""
        if self.record and column in self.record.final.get(split, {}):
            value = self.record.final[split][column]
            return float(value) if value is not None and np.isfinite(value) else None
        values = self.column(split, column)
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    def column(self, split: str, name: str) -> Floats:
        """All values of a column [N], NaN where not measured; empty if there is no such row."""
        return self.metrics.get(split, {}).get(name, np.empty(0))

    def curve(self, split: str, column: str) -> Curve:
        """The finite values of a column over updates."""
        values, updates = self.column(split, column), self.column(split, "update")
        finite = np.isfinite(values)
        return Curve(updates[finite], values[finite], f"seed {self.folder.seed}")


@dataclass(frozen=True)
class Work:
    """A work folder. As a source of claims its counted runs are the seeds.

    ``name`` is unique among the works of a report; ``data`` is what ``data/summary.json`` holds.
    """

    name: str
    recipe: Mapping[str, Any]
    runs: dict[tuple[Stage, str, int], Run]
    data: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def seeds_planned(self) -> list[int]:
        seeds = self.recipe.get("seeds")
        if isinstance(seeds, list) and seeds:
            return [seed for seed in seeds if isinstance(seed, int)]
        return sorted({seed for _, _, seed in self.runs})

    @property
    def repeats(self) -> bool:
        """Whether the recipe repeats what was written or run, going by its name.

        Then the question is whether published numbers and differences come back; of every other
        recipe it is whether the method helps.
        """
        name = str(self.recipe.get("name", ""))
        return any(part in ("as-run", "as-written") for part in name.split("+"))

    def overrides(self, stage: Stage, arm: str) -> Mapping[str, Any]:
        """What the recipe lays over the stage's section for an arm (dotted keys)."""
        section = self.recipe.get(stage)
        arms = section.get("arms") if isinstance(section, Mapping) else None
        found = arms.get(arm) if isinstance(arms, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def planned_arms(self, stage: Stage) -> list[str]:
        section = self.recipe.get(stage)
        arms = section.get("arms") if isinstance(section, Mapping) else None
        return [str(arm) for arm in arms] if isinstance(arms, Mapping) else []

    def arms(self, stage: Stage) -> list[str]:
        """Planned arms in recipe order, then those only found as folders."""
        found = [arm for of, arm, _ in self.runs if of == stage]
        return list(dict.fromkeys([*self.planned_arms(stage), *found]))

    def of(self, stage: Stage, arm: str) -> list[Run]:
        """Every run of an arm, by seed."""
        keys = sorted(key for key in self.runs if key[:2] == (stage, arm))
        return [self.runs[key] for key in keys]

    def counted(self, stage: Stage, arm: str) -> list[Run]:
        return [run for run in self.of(stage, arm) if run.counted]

    def missing(self, stage: Stage, arm: str) -> list[int]:
        """Planned seeds of an arm without a run folder."""
        if arm not in self.planned_arms(stage):
            return []
        return [seed for seed in self.seeds_planned if (stage, arm, seed) not in self.runs]

    def values(self, stage: Stage, arm: str, split: str, column: str) -> list[float]:
        """Final values of a column over the counted runs of an arm."""
        found = (run.final(split, column) for run in self.counted(stage, arm))
        return [value for value in found if value is not None]

    def seeds(self, stage: Stage, arm: str) -> set[int]:
        return {
            run.folder.seed
            for run in self.counted(stage, arm)
            if run.final("valid", LOSS[stage]) is not None
        }

    def final(
        self,
        stage: Stage,
        split: str,
        arm: str,
        seed: int,
        column: str = "",
        *,
        series: bool = False,
    ) -> float | None:
        return self.runs[stage, arm, seed].final(split, column or LOSS[stage])

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve | None:
        return self.runs[stage, arm, seed].curve(split, LOSS[stage])

    def codes(self, stage: Stage, arm: str, seed: int) -> Codes:
        return self.runs[stage, arm, seed].codes


def read_work(root: Path) -> Work:
    """Read a work folder.

    Raises:
        DataError: there is no such folder, it holds neither a recipe nor a run, or its
            ``recipe.yaml`` isn't a mapping in YAML.
    """
    folder = WorkFolder(Path(root))
    if not folder.root.is_dir():
        raise DataError(
            "no such work folder", where=str(root), do="run a stage first, or give --work DIR"
        )
    recipe: Mapping[str, Any] = {}
    if folder.recipe.is_file():
        try:
            recipe = yaml.load(folder.recipe.read_text(encoding="utf-8"), Loader=_LOADER)
        except (yaml.YAMLError, UnicodeDecodeError):
            recipe = None  # type: ignore[assignment]
        if not isinstance(recipe, Mapping):
            raise DataError(
                "not a recipe", where=str(folder.recipe), do="run a stage again to rewrite it"
            )
    elif not any(any(folder.runs(stage)) for stage in STAGES):
        raise DataError(
            "not a work folder: neither recipe.yaml nor a run",
            where=str(root),
            do="give the folder that holds recipe.yaml, pretrain/ and finetune/",
        )
    name = recipe.get("name")
    if not isinstance(name, str) or not name:
        name = folder.root.resolve().name
    runs = [
        run
        for stage in STAGES
        for run in _without_copies(read_run(found) for found in folder.runs(stage))
    ]
    by_name = {(run.folder.stage, run.folder.arm, run.folder.seed): run for run in runs}
    return Work(without_paths(name), recipe, by_name, _read_json(folder.summary))


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if the file isn't there or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _without_copies(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs; one whose losses are another seed's to the last digit is a copied folder: suspect."""
    seen: set[tuple[str, bytes]] = set()
    for run in runs:
        curves = (run.curve(split, LOSS[run.folder.stage]) for split in ("train", "valid"))
        arrays = [array for curve in curves for array in (curve.updates, curve.values)]
        key = (run.folder.arm, b"|".join(array.tobytes() for array in arrays))
        known = key in seen
        if any(map(len, arrays)):
            seen.add(key)
        yield replace(run, suspect="identical to another seed") if known else run


def read_run(folder: RunFolder) -> Run:
    """Read one run folder, whatever state it is in."""
    record, problem, suspect = None, "", ""
    if folder.record.is_file():
        try:
            record = RunRecord.read(folder.record)
            _check(record)
            if (record.arm, record.seed) != (folder.arm, folder.seed):
                suspect = f"with the run.json of {record.arm}/seed-{record.seed}"
        except (ValueError, TypeError, AttributeError):
            record, problem = None, "run.json can't be read"
    try:
        metrics = read_metrics(folder.metrics, folder.stage)
    except (ValueError, OSError):
        metrics, problem = {}, "metrics.csv can't be read"
    return Run(folder, record, metrics, problem, suspect)


def _check(record: RunRecord) -> None:
    """Values of the types the report relies on; another version's may differ."""
    kinds: tuple[tuple[type[Any], tuple[Any, ...]], ...] = (
        (str, (record.status, record.outcome, record.reason, record.device, record.precision,
               record.started, record.ended or "", record.git or "", record.recipe_sha256,
               record.manifest_sha256)),
        (list, (record.bank,)),
        (str, tuple(record.bank)),
        (dict, (record.final, *record.final.values(), record.versions, record.settings)),
        (Real, (record.wall_seconds, record.updates_planned, record.world_size)),
        (Real, tuple(v or 0 for row in record.final.values() for v in row.values())),
    )  # fmt: skip
    for kind, values in kinds:
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"run.json: a value isn't a {kind.__name__}")


def read_metrics(path: Path, stage: Stage) -> dict[str, Columns]:
    """Metrics by split and column, rows in order of updates.

    A last line without its newline is still being written and left out: its last number may be
    cut. Of rows for the same update, as a continued run may write, the last one counts. Columns
    that a file lacks are NaN.

    Raises:
        ValueError: the file isn't a table with ``update`` and ``split``.
    """
    if not path.is_file():
        return {}
    text = path.read_bytes()
    text = text[: text.rfind(b"\n") + 1]
    if not text.strip():
        return {}
    frame = pd.read_csv(io.BytesIO(text), on_bad_lines="skip", encoding_errors="replace")
    if not {"update", "split"} <= set(frame.columns):
        raise ValueError(f"{path}: no update or split column")
    columns = {
        name: _numbers(frame[name]) if name in frame else np.full(len(frame), np.nan)
        for name in METRIC_COLUMNS[stage]
        if name != "split"
    }
    splits, updates = frame["split"].to_numpy(dtype=object), columns["update"]
    metrics: dict[str, Columns] = {}
    for split in ("train", "valid", "test"):
        rows = np.flatnonzero((splits == split) & np.isfinite(updates))
        # unique() takes the first of equals: reversed, that is the last one written
        rows = rows[::-1][np.unique(updates[rows[::-1]], return_index=True)[1]]
        if len(rows):
            metrics[split] = {name: values[rows] for name, values in columns.items()}
    return metrics


def _numbers(cells: pd.Series) -> Floats:
    if not pd.api.types.is_numeric_dtype(cells):
        cells = pd.to_numeric(cells, errors="coerce")
    return cells.to_numpy(dtype=np.float64)


_ARM = re.compile(r"(?P<no>no_)?icsl(_[a-z]+)?_(?P<codebooks>\d+)cb")


def codebooks_of(arm: str, overrides: Mapping[str, Any]) -> int | None:
    """Codebooks of a pretraining arm, from the recipe or else from its name."""
    value = overrides.get("quantizer.codebooks")
    if value is None and (match := _ARM.fullmatch(arm)):
        value = match["codebooks"]
    return _whole(value)


def icsl_of(arm: str, overrides: Mapping[str, Any]) -> bool | None:
    """Whether a pretraining arm uses ICSL, from the recipe or else from its name."""
    weight = overrides.get("icsl.weight")
    if isinstance(weight, int | float):
        return weight > 0
    match = _ARM.fullmatch(arm)
    return match["no"] is None if match else None


def levels_of(arm: str, overrides: Mapping[str, Any]) -> int | None:
    """RVQ levels of a fine-tuning arm, 0 for none, from the recipe or else from its name."""
    value = overrides.get("rvq.levels")
    if value is None:
        match = re.fullmatch(r"(?:.+_)?(?:(?P<no>no)_rvq|rvq_(?P<levels>\d+))(?:_.+)?", arm)
        value = (match["levels"] or 0) if match else None
    return _whole(value)


_OF_A_SERIES: dict[Stage, re.Pattern[str]] = {
    "pretrain": re.compile(r".+_\d+cb"), "finetune": re.compile(r"no_rvq|rvq_\d+")
}  # fmt: skip


def arms_of_a_series(arms: Sequence[str], stage: Stage) -> list[str]:
    """The arms that are points over codebooks or levels, by name: ``icsl_8cb``, ``rvq_4``.

    Others, such as ``rvq_4_10min`` or those of another encoder, have the same size and would stand
    in their place. Where no arm is named like that, all are taken.
    """
    return [arm for arm in arms if _OF_A_SERIES[stage].fullmatch(arm)] or list(arms)


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def speakers(data: Mapping[str, Any]) -> dict[str, int]:
    """How many speakers each split of the prepared data has; kept runs say the number alone."""
    listed = data.get("speakers")
    listed = listed if isinstance(listed, Mapping) else {}
    counts = {split: who if isinstance(who, int) else len(who) for split, who in listed.items()
              if isinstance(who, int | list)}  # fmt: skip
    return {split: count for split, count in counts.items() if count}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; lists and empty mappings are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
