"""The grid as its files show it: ``run.json``, ``metrics.csv``, ``.lock`` of each run. No torch."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reproduce.grid.lock import Holder, holder_of
from reproduce.recipe.schema import Recipe
from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder

STAGES: tuple[Stage, ...] = ("pretrain", "finetune")
LOSSES = {"pretrain": ("contrastive_loss", "chance_loss"), "finetune": ("ctc_loss", "wer")}
COLUMNS = (
    "run", "state", "update", "train", "valid", "chance/WER", "left", "where", "last sign",
)  # fmt: skip
NOBODY = Holder()


@dataclass(frozen=True)
class RunState:
    """Where a run is.

    Attributes:
        state: waiting, training, finished, diverged, failed, interrupted, or gone: its record says
            that it runs, and nobody holds its lock.
        update, updates: done and planned; planned from the recipe until the run begins.
        train, valid: the last loss of each split; None: no row yet.
        beside: chance loss, or WER, of the last validation.
        seconds_left: by its own pace, while it trains.
        holder: who trains it, or did when it was gone.
        last_sign: Unix time of the newest row, record or heartbeat; None: nothing yet.
        reason: of a run that failed or was interrupted.
    """

    run: RunFolder
    state: str
    update: int
    updates: int
    train: float | None = None
    valid: float | None = None
    beside: float | None = None
    seconds_left: float | None = None
    holder: Holder = NOBODY
    last_sign: float | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        """Nothing more happens to it in this grid."""
        return self.state in ("finished", "diverged", "failed")

    @property
    def held(self) -> bool:
        """Somebody trains it."""
        return self.state == "training"


def grid_runs(
    recipe: Recipe,
    work: WorkFolder,
    stages: Sequence[Stage] = STAGES,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[tuple[RunFolder, int]]:
    """Every run of a recipe's grid with its planned updates, in the order they are trained."""
    found = []
    for stage in stages:
        section = getattr(recipe, stage)
        section_of = recipe.pretrain_arm if stage == "pretrain" else recipe.finetune_arm
        chosen = [arm for arm in section.arms if arms is None or arm in arms]
        updates = {arm: section_of(arm).updates for arm in chosen}
        for seed in recipe.seeds:
            if seeds is None or seed in seeds:
                found += [(work.run(stage, arm, seed), updates[arm]) for arm in chosen]
    return found


def run_state(run: RunFolder, updates: int) -> RunState:
    """One run's state, whatever of its files is there."""
    try:
        record = RunRecord.read(run.record)
    except (OSError, ValueError, TypeError):
        record = None
    holder, held = holder_of(run.lock)
    if record is None:
        state = "training" if held else "waiting"
    elif record.status == "running":
        state = "training" if held else "gone"
    elif record.outcome == "diverged":
        state = "diverged"
    else:
        state = "training" if held and record.status != "finished" else record.status
    rows = _rows(run)
    splits = {row["split"]: row for row in rows}
    loss, beside = LOSSES[run.stage]
    valid = splits.get("valid", {})
    done = float(record.updates) if record is not None else 0.0
    if rows:
        done = max(done, _number(rows[-1], "update") or 0.0)
    if record is not None and record.updates_planned:
        updates = record.updates_planned
    signs = [p.stat().st_mtime for p in (run.metrics, run.record) if p.exists()]
    return RunState(
        run,
        state,
        int(done),
        updates,
        _number(splits.get("train", {}), loss),
        _number(valid, loss),
        _number(valid, beside),
        _seconds_left(rows, updates) if state == "training" else None,
        holder if state in ("training", "gone") else NOBODY,
        max([*signs, holder.beat]) if signs or holder.beat else None,
        record.reason if record is not None else "",
    )


def _rows(run: RunFolder) -> list[dict[str, str]]:
    """metrics.csv, but for a row that is being written."""
    try:
        with open(run.metrics, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error, UnicodeDecodeError):
        return []
    return [row for row in rows if row.get("wall_seconds") and None not in row]


def _number(row: dict[str, str], name: str) -> float | None:
    try:
        return float(row[name])
    except (KeyError, TypeError, ValueError):
        return None


def _seconds_left(rows: Sequence[dict[str, str]], updates: int) -> float | None:
    """By the pace of the newer half of its rows."""
    points = [(_number(row, "update"), _number(row, "wall_seconds")) for row in rows]
    good = [(update, wall) for update, wall in points if update is not None and wall is not None]
    if not good:
        return None
    (last, now), (first, then) = good[-1], good[len(good) // 2 - 1] if len(good) > 1 else (0.0, 0.0)
    if last <= first:
        return None
    return (updates - last) * (now - then) / (last - first)


def status_lines(states: Sequence[RunState], now: float | None = None) -> Iterator[str]:
    """A table of the runs, what went wrong, and a line that counts."""
    now = time.time() if now is None else now
    table = [COLUMNS, *(_cells(state, now) for state in states)]
    widths = [max(len(row[n]) for row in table) for n in range(len(COLUMNS))]
    right = {2, 3, 4, 5, 6}
    for row in table:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    for state in states:
        if state.state in ("failed", "diverged", "interrupted") and state.reason:
            yield f"{state.run.name}: {_short(state.reason)}"
        elif state.state == "gone":
            who = str(state.holder) if state.holder.held else "its process"
            yield f"{state.run.name}: {who} is gone; the same command again goes on with it"
    yield summary_line(states)


def state_line(state: RunState) -> str:
    """One run in a line: ``pretrain/icsl_8cb/seed-1: training 40/150, train 4.3000, ...``."""
    names = ("train", "valid", LOSSES[state.run.stage][1].partition("_")[0])
    numbers = zip(names, (state.train, state.valid, state.beside), strict=True)
    where = " ".join(filter(None, (state.holder.host, state.holder.device)))
    worker = f"worker {state.holder.worker}" if state.holder.worker else ""
    parts = [
        f"{state.state} {state.update}/{state.updates}",
        *(f"{name} {value:.4f}" for name, value in numbers if value is not None),
        *(part for part in (worker, where) if part),
        *([_short(state.reason)] if state.reason and state.state != "training" else []),
    ]
    return f"{state.run.name}: {', '.join(parts)}"


def summary_line(states: Sequence[RunState]) -> str:
    """``3 of 14 finished, 2 training, 1 failed``."""
    counts: dict[str, int] = {}
    for state in states:
        counts[state.state] = counts.get(state.state, 0) + 1
    rest = [f"{count} {name}" for name, count in counts.items() if name != "finished"]
    return ", ".join([f"{counts.get('finished', 0)} of {len(states)} finished", *rest])


def _cells(state: RunState, now: float) -> tuple[str, ...]:
    where = " ".join(part for part in (state.holder.host, state.holder.device) if part)
    return (
        state.run.name,
        state.state,
        f"{state.update}/{state.updates}",
        _shown(state.train),
        _shown(state.valid),
        _shown(state.beside),
        duration(state.seconds_left),
        where,
        f"{duration(now - state.last_sign)} ago" if state.last_sign is not None else "",
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
