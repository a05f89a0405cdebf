"""Arms x seeds: which runs are due, one process a run, what is finished is skipped."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from reproduce.errors import DataError, DivergedError, UsageError, W2vrepError
from reproduce.recipe.schema import settings_sha256
from reproduce.records import RunFolder, RunRecord
from reproduce.tasks.card import CARD, write_card
from reproduce.tasks.context import Context, read_record
from reproduce.training.provenance import device_name, git_commit, now, versions


def run_grid(
    context: Context,
    units: Sequence[tuple[list[str], int]],
    train: Callable[[list[str], int, dict[str, RunRecord], str], None],
) -> None:
    """Train every unit (arms that train together, seed) that is due.

    A run that diverges, or lacks what it stands on, doesn't keep the others from being done.

    Args:
        context: of the grid.
        units: in order.
        train: trains the arms given of a seed; takes their records and a label for progress bars.

    Raises:
        UsageError: a run was begun with other settings or data.
        DivergedError: some run, or one that it stands on, diverged, now or before; the others are
            done.
        DataError: some run lacks what it stands on; the others are done.
    """
    left = _LeftOut()
    for number, (arms, seed) in enumerate(units, 1):
        label = f"{context.stage} {number}/{len(units)} {'+'.join(arms)} seed {seed}"
        with _claim(context, arms, seed, left) as records:
            if not records:
                continue
            started = time.monotonic()
            try:
                train(list(records), seed, records, label)
            except W2vrepError:
                raise
            except Exception as error:
                _failed(context, records, seed, error)
                raise
            seconds = time.monotonic() - started
            for arm, record in records.items():
                run = context.work.run(context.stage, arm, seed)
                _describe(context, run)
                if record.outcome == "diverged":
                    left.diverged.append(run.name)
                share = "" if len(records) == 1 else f" for {len(records)} arms together"
                context.say(f"{run.name}: {describe(record)}, {seconds:.0f} s{share}")
    left.report()


def _describe(context: Context, run: RunFolder) -> None:
    """Give a finished model its card."""
    if context.ranks.main and run.model.is_dir() and not (run.model / CARD).exists():
        write_card(context.work, run)


def describe(record: RunRecord) -> str:
    """A finished run in a few words."""
    final = record.final.get("valid", {})
    parts = [record.status if record.outcome == "ok" else f"{record.status}, {record.outcome}"]
    for name, label in (
        ("contrastive_loss", "loss"),
        ("chance_loss", "chance"),
        ("ctc_loss", "CTC"),
        ("wer", "WER"),
        ("cer", "CER"),
    ):
        value = final.get(name)
        if value is not None:
            parts.append(f"{label} {value:.4f}" if "loss" in name else f"{label} {value:.3f}")
    return ", ".join(parts)


class _LeftOut:
    """The runs that the grid did without."""

    def __init__(self) -> None:
        self.diverged: list[str] = []
        self.missing: dict[str, DataError] = {}

    def report(self) -> None:
        """Raise an error that names them, if there are any."""
        lacking = f"{len(self.missing)} of the runs can't begin: {', '.join(self.missing)}"
        if self.diverged:
            raise DivergedError(
                f"{len(self.diverged)} of the runs diverged: {', '.join(self.diverged)}"
                + (f"; {lacking}" if self.missing else ""),
                do="run.json of each names the update and the utterances; the other runs are done",
            )
        if self.missing:
            first = next(iter(self.missing.values()))
            where = f"{first.where}: " if first.where else ""
            raise DataError(f"{lacking}; {where}{first.found}", do=first.do)


@contextmanager
def _claim(
    context: Context, arms: Sequence[str], seed: int, left: _LeftOut
) -> Iterator[dict[str, RunRecord]]:
    """Lock the arms' folders and give the records of those that are due.

    The main rank decides, the others follow.
    """
    with ExitStack() as locks:
        due: dict[str, RunRecord] = {}
        problem: W2vrepError | None = None
        notes: list[str] = []
        if context.ranks.main:
            try:
                for arm in arms:
                    run = context.work.run(context.stage, arm, seed)
                    record = _open(context, run, locks, notes, left)
                    if record is not None:
                        due[arm] = record
            except W2vrepError as error:
                problem = error
        mine = (problem, due, notes, left.diverged, left.missing)
        problem, due, notes, left.diverged, left.missing = context.ranks.gather(mine)[0]
        if problem is not None:
            raise problem
        for note in notes:
            context.say(note)
        yield due


def _open(
    context: Context, run: RunFolder, locks: ExitStack, notes: list[str], left: _LeftOut
) -> RunRecord | None:
    """A run's record if it is due and nobody else trains it."""
    try:
        settings = context.settings(run.arm, run.seed)
    except DivergedError as error:
        notes.append(f"{run.name}: left out, {error.found}")
        left.diverged.append(f"{run.name} ({error.found})")
        return None
    except DataError as error:
        notes.append(f"{run.name}: left out, {error.found}")
        left.missing[run.name] = error
        return None
    run.root.mkdir(parents=True, exist_ok=True)
    lock = locks.enter_context(run.lock.open("w", encoding="utf-8"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        notes.append(f"{run.name}: another process trains it")
        return None
    before = read_record(run)
    if before is not None:
        _require_same(run, before, settings, context.manifest.sha256)
        if before.outcome == "diverged":
            notes.append(f"{run.name}: diverged before; delete its folder to train it anew")
            left.diverged.append(run.name)
            return None
        if before.status == "finished":
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # killed before it could
            _describe(context, run)
            notes.append(f"{run.name}: finished before")
            return None
    return RunRecord(
        arm=run.arm,
        seed=run.seed,
        recipe_sha256=settings_sha256(settings),
        manifest_sha256=context.manifest.sha256,
        git=git_commit(),
        versions=versions(),
        device=device_name(context.ranks.device),
        precision=context.recipe.compute.precision,
        world_size=context.ranks.world,
        started=before.started if before is not None else now(),
        settings=settings,
    )


def _require_same(
    run: RunFolder, before: RunRecord, settings: dict[str, Any], manifest_sha256: str
) -> None:
    """What was begun under other settings or data is neither continued nor taken for the same."""
    if before.recipe_sha256 != settings_sha256(settings):
        then, today = dict(_flat(before.settings)), dict(_flat(settings))
        changes = [
            f"{path} {then.get(path)} -> {today.get(path)}"
            for path in sorted(then.keys() | today.keys())
            if then.get(path) != today.get(path)
        ]
        raise UsageError(
            f"made with other settings: {'; '.join(changes) or 'recipe hash differs'}",
            where=run.name,
            do="choose another --work folder, undo the change, or delete this run's folder",
        )
    if before.manifest_sha256 != manifest_sha256:
        raise UsageError(
            "made from other data: data/manifest.csv has changed since",
            where=run.name,
            do="choose another --work folder, or delete this run's folder to train it anew",
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _failed(context: Context, records: dict[str, RunRecord], seed: int, error: Exception) -> None:
    if not context.ranks.main:
        return
    for arm, record in records.items():
        if record.status == "running":
            record.status, record.ended = "failed", now()
            record.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            record.write(context.work.run(context.stage, arm, seed).record)
