"""Arms x seeds: which runs are due, one process a run, what is finished is skipped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from reproduce.errors import (
    DataError,
    DivergedError,
    FailedRunsError,
    InterruptedRun,
    UnfinishedError,
    UsageError,
    W2vrepError,
)
from reproduce.grid.lock import (
    DEATHS,
    RunLock,
    Taken,
    beating,
    grid_started,
    holder_of,
    is_worker,
    require_locks,
)
from reproduce.recipe.schema import settings_sha256
from reproduce.records import RunFolder, RunRecord
from reproduce.tasks.card import CARD, write_card
from reproduce.tasks.context import Context, read_record
from reproduce.training.provenance import device_name, git_commit, now, versions

WAIT_SECONDS = 2.0
"""Between two passes over runs that other processes train."""

Unit = tuple[list[str], int]
"""Arms that train together, and their seed."""


def run_grid(
    context: Context,
    units: Sequence[Unit],
    train: Callable[[list[str], int, dict[str, RunRecord], str], None],
) -> None:
    """Train every unit (arms that train together, seed) that is due.

    Runs that other processes train are passed over again until each is finished or failed; one
    whose process died is taken up. One worker of several leaves instead when it can claim nothing
    more. A run that stands on another of these waits for it; one that diverges, or lacks what it
    stands on, doesn't keep the others from being done.

    Args:
        context: of the grid.
        units: in order.
        train: trains the arms given of a seed; takes their records and a label for progress bars.

    Raises:
        UsageError: a run was begun with other settings or data, or files can't be locked.
        FailedRunsError: some run failed in another process; the others are done.
        DivergedError: some run, or one that it stands on, diverged, now or before; the others are
            done.
        DataError: some run lacks what it stands on; the others are done.
    """
    if context.ranks.main:
        require_locks(context.work.root)
    grid = _Grid(context, grid_started())
    grid.due = {context.work.run(context.stage, a, s).name for arms, s in units for a in arms}
    labels = {
        (arm, seed): f"{context.stage} {number}/{len(units)} {'+'.join(arms)} seed {seed}"
        for number, (arms, seed) in enumerate(units, 1)
        for arm in arms
    }
    due = list(units)
    while due:
        left: list[Unit] = []
        idle, some_wait = True, False
        for arms, seed in due:
            with grid.claim(arms, seed) as claim:
                if claim.records:
                    idle = False
                    _train(context, claim, seed, train, labels[arms[0], seed])
                    grid.note_ends(claim, seed)
            if claim.busy or claim.waiting:
                left.append(([arm for arm in arms if arm in claim.busy + claim.waiting], seed))
            some_wait = some_wait or bool(claim.waiting)
        due = left
        if due and is_worker() and not some_wait:
            if idle:
                context.say("nothing left to claim")
                break
        elif due and idle:
            grid.wait(due)
    grid.report()


def _train(
    context: Context,
    claim: _Claim,
    seed: int,
    train: Callable[[list[str], int, dict[str, RunRecord], str], None],
    label: str,
) -> None:
    started = time.monotonic()
    try:
        train(list(claim.records), seed, claim.records, label)
    except W2vrepError:
        raise
    except Exception as error:
        claim.failed = _failed(context, claim.records, seed, f"{type(error).__name__}: {error}")
        raise
    seconds = time.monotonic() - started
    for arm, record in claim.records.items():
        share = "" if len(claim.records) == 1 else f" for {len(claim.records)} arms together"
        run = context.work.run(context.stage, arm, seed)
        _describe(context, run)
        context.say(f"{run.name}: {describe(record)}, {seconds:.0f} s{share}")


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


@dataclass
class _Claim:
    """What this process got of a unit.

    Attributes:
        records: arm -> the record of a run to train now.
        busy: arms that another process trains.
        waiting: arms that stand on a run of this grid which isn't over.
        failed: arms whose training ended with an error.
    """

    records: dict[str, RunRecord] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass
class _Grid:
    """What is known of the grid's runs: those that may still come (``due``), those that were done
    without, and those waited for."""

    context: Context
    started: float
    due: set[str] = field(default_factory=set)
    diverged: dict[str, str] = field(default_factory=dict)
    missing: dict[str, DataError] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waited: set[str] = field(default_factory=set)
    waiting_for: list[str] = field(default_factory=list)

    @contextmanager
    def claim(self, arms: Sequence[str], seed: int) -> Iterator[_Claim]:
        """Lock the arms' folders and give the records of those that are due.

        The main rank decides, the others follow.
        """
        context, claim, locks = self.context, _Claim(), dict[str, RunLock]()
        problem: W2vrepError | None = None
        notes: list[str] = []
        try:
            if context.ranks.main:
                try:
                    for arm in arms:
                        self._open(context.work.run(context.stage, arm, seed), claim, locks, notes)
                except W2vrepError as error:
                    problem = error
            known = (claim, problem, notes, self.diverged, self.missing, self.failed)
            claim, problem, notes, self.diverged, self.missing, self.failed = context.ranks.gather(
                known
            )[0]
            for note in notes:
                context.say(note)
            if problem is not None:
                raise problem
            with beating(list(locks.values())):
                yield claim
        except InterruptedRun:
            for lock in locks.values():
                lock.require_kept()
            raise
        finally:
            for arm, lock in locks.items():
                lock.release(failed=arm in claim.failed)

    def _open(
        self, run: RunFolder, claim: _Claim, locks: dict[str, RunLock], notes: list[str]
    ) -> None:
        """Claim a run if it is due and nobody else trains it; else note why not."""
        context = self.context
        if run.name in self.waited and holder_of(run.lock)[1]:  # before its encoder is read again
            claim.busy.append(run.arm)
            return
        try:
            settings = context.settings(run.arm, run.seed)
        except DivergedError as error:
            notes.append(f"{run.name}: left out, {error.found}")
            self.diverged[run.name] = f" ({error.found})"
            return
        except DataError as error:
            if isinstance(error, UnfinishedError) and self._may_come(error.run):
                claim.waiting.append(run.arm)
                return
            notes.append(f"{run.name}: left out, {error.found}")
            self.missing[run.name] = error
            return
        run.root.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.lock, self.started, _place(context))
        try:
            taken = lock.take()
            if taken == "busy":
                claim.busy.append(run.arm)
                if run.name not in self.waited:
                    notes.append(f"{run.name}: {lock.before} trains it")
                    self.waited.add(run.name)
                return
            before = read_record(run)
            if before is not None:
                _require_same(run, before, settings, context.manifest.sha256)
            over = self._over(run, before, settings, lock, taken)
            if over:
                notes.append(f"{run.name}: {over}")
                return
            if lock.before.held:
                notes.append(f"{run.name}: {lock.before} died; taken up again")
            claim.records[run.arm] = self._record(run, before, settings)
            locks[run.arm] = lock
        finally:
            if run.arm not in locks:
                lock.release(failed=run.name in self.failed)

    def _may_come(self, name: str) -> bool:
        """Whether a run that isn't finished is one of this grid's that can still be."""
        return name in self.due and name not in {**self.missing, **self.failed, **self.diverged}

    def _over(
        self,
        run: RunFolder,
        before: RunRecord | None,
        settings: dict[str, Any],
        lock: RunLock,
        taken: Taken,
    ) -> str:
        """Why a run isn't to be trained now; empty if it is."""
        if before is not None and before.outcome == "diverged":
            self.diverged[run.name] = ""
            if run.name in self.waited:
                return "diverged, in another process"
            return "diverged before; delete its folder to train it anew"
        if before is not None and before.status == "finished":
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # killed before it could
            _describe(self.context, run)
            waited = run.name in self.waited
            return "finished by another process" if waited else "finished before"
        if taken == "died":
            reason = (
                f"{DEATHS} processes died while training it, the last was {lock.before}: killed, "
                "or out of memory"
            )
            record = before if before is not None else self._record(run, None, settings)
            record.status, record.reason, record.ended = "failed", reason, now()
            record.write(run.record)
            self.failed[run.name] = reason
            return f"failed: {reason}"
        if taken == "failed":
            self.failed[run.name] = before.reason if before is not None else "no record"
            return f"failed in another process: {self.failed[run.name]}"
        return ""

    def _record(
        self, run: RunFolder, before: RunRecord | None, settings: dict[str, Any]
    ) -> RunRecord:
        context = self.context
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

    def note_ends(self, claim: _Claim, seed: int) -> None:
        """Remember which of the runs just trained diverged."""
        for arm, record in claim.records.items():
            if record.outcome == "diverged":
                self.diverged[self.context.work.run(self.context.stage, arm, seed).name] = ""

    def wait(self, units: Sequence[Unit]) -> None:
        """For those who train what is left."""
        names = [
            self.context.work.run(self.context.stage, arm, seed).name
            for arms, seed in units
            for arm in arms
        ]
        if names != self.waiting_for:
            self.context.say(f"waiting for {len(names)} of the runs: {', '.join(names)}")
            self.waiting_for = names
        if self.context.ranks.main:
            time.sleep(WAIT_SECONDS)

    def report(self) -> None:
        """Raise an error that names the runs that the grid did without, if there are any."""
        parts = []
        if self.failed:
            parts.append(f"{len(self.failed)} of the runs failed: {', '.join(self.failed)}")
        if self.diverged:
            names = ", ".join(f"{name}{why}" for name, why in self.diverged.items())
            parts.append(f"{len(self.diverged)} of the runs diverged: {names}")
        if self.missing:
            parts.append(f"{len(self.missing)} of the runs can't begin: {', '.join(self.missing)}")
        found = "; ".join(parts)
        if self.failed:
            reasons = "; ".join(dict.fromkeys(self.failed.values()))
            raise FailedRunsError(
                f"{found} ({reasons})", do="the same command tries them again; the others are done"
            )
        if self.diverged:
            raise DivergedError(
                found,
                do="run.json of each names the update and the utterances; the other runs are done",
            )
        if self.missing:
            first = next(iter(self.missing.values()))
            where = f"{first.where}: " if first.where else ""
            raise DataError(f"{found}; {where}{first.found}", do=first.do)


def _place(context: Context) -> str:
    """What this process trains on: ``cuda 3``, as the machine counts them."""
    device = context.ranks.device
    if device.type != "cuda":
        return device.type
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return f"cuda {visible[index] if index < len(visible) and visible[index] else index}"


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


def _failed(context: Context, records: dict[str, RunRecord], seed: int, reason: str) -> list[str]:
    """Write down how the runs ended that were still being trained; their arms."""
    failed = [arm for arm, record in records.items() if record.status == "running"]
    for arm in failed if context.ranks.main else []:
        record = records[arm]
        record.status, record.ended = "failed", now()
        record.reason = reason.splitlines()[0]
        with suppress(OSError):  # a full disk: what went wrong first is what is told
            record.write(context.work.run(context.stage, arm, seed).record)
    return failed
