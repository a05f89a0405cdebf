"""The one loop: micro-batches in, updates out; sums and counts added up, divided once.

A `Task` says what a micro-batch costs each of its learners; a `Learner` is one run: parameters,
optimizer, metrics, checkpoints. Pretraining has one learner; a bank of heads has one a head.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reproduce.data.batches import Batch, Plan, Speech, prefetch
from reproduce.errors import InterruptedRun
from reproduce.position import derive_seed, generator
from reproduce.records import METRIC_COLUMNS, Outcome, RunFolder, RunRecord, Stage, Status
from reproduce.training.checkpoint import (
    CheckpointWriter,
    checkpoint_updates,
    drop_later_checkpoints,
    load_checkpoint,
)
from reproduce.training.curves import Curves
from reproduce.training.curves import available as curves_available
from reproduce.training.distributed import Ranks, under_launcher
from reproduce.training.metrics import Means, MetricsFile
from reproduce.training.provenance import now
from reproduce.training.schedule import LearningRate, micro_batch_weights

Row = dict[str, float | int | str | None]


@dataclass
class Terms:
    """What one micro-batch gives one learner.

    Attributes:
        loss: the summed loss to differentiate.
        metrics: name -> (sum, count); tensors stay on the device until the update ends.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Learner:
    """One run in training.

    Args:
        run: its folder.
        record: its ``run.json``, written here as things happen.
        parameters: what is trained, in an order that stays the same.
        optimizer: over these parameters; the loop sets its learning rate.
        clip_norm: largest gradient norm; None: no clipping.

    Attributes:
        earlier_seconds: active time before the loop: set to what was spent on preparing this run,
            and what a checkpoint remembers is added.
        validation_seconds: of the active time, what validation took.
    """

    def __init__(
        self,
        run: RunFolder,
        record: RunRecord,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        self.run, self.record = run, record
        self.parameters, self.optimizer, self.clip_norm = list(parameters), optimizer, clip_norm
        self.name = run.name
        self.curves = Curves(run.events, record) if curves_available() else None
        self.metrics = MetricsFile(run.metrics, METRIC_COLUMNS[run.stage], self.curves)
        self.means = Means()
        self.last: dict[str, Row] = {}
        self.audio_seconds = 0.0
        self.earlier_seconds = 0.0
        self.validation_seconds = 0.0
        self.active = True

    def gradients(self) -> list[Tensor]:
        """Of the parameters trained at this update; a gradient that nothing sent is zero."""
        found = []
        for parameter in self.parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        return found


class Task(ABC):
    """What is trained: wiring between batches, model and objectives."""

    metric_names: tuple[str, ...]
    """The names that `forward` gives metrics, the same on all ranks."""
    total_names: tuple[str, ...] = ()
    """Those of them whose column is the sum since the last row, not the mean."""

    def look_ahead(  # noqa: B027
        self, update: int, micro_batches: Sequence[Sequence[int]], own: Sequence[int]
    ) -> Any:
        """What `begin_update` takes beside the micro-batches: a function of their position.

        Made in a thread while the update before is trained. ``own``: this rank's micro-batches.
        """

    @abstractmethod
    def begin_update(self, update: int, micro_batches: Sequence[Sequence[int]], ahead: Any) -> None:
        """Before the first forward of an update, on every rank."""

    @abstractmethod
    def counts(self, micro_batches: Sequence[Sequence[int]]) -> list[int]:
        """Masked frames or utterances of each micro-batch of the update begun."""

    @abstractmethod
    def forward(self, update: int, index: int, batch: Batch) -> dict[str, Terms]:
        """Learner name -> terms of micro-batch ``index``; the random stream is at its position."""

    def inspect(self, update: int, weights: list[float] | None, divisor: float) -> Row:
        """Metrics read off the finished gradients, before the step."""
        return {}

    def end_update(self, update: int, ranks: Ranks) -> None:  # noqa: B027
        """After the step, on every rank (codebooks that move once an update)."""

    def values(self, update: int, learner: Learner) -> Row:
        """Columns of a train row that are no means of `metric_names`."""
        return {}

    @abstractmethod
    def validate(self, update: int, ranks: Ranks) -> dict[str, Row]:
        """Learner name -> a row's metrics over the validation set, on every rank."""

    @abstractmethod
    def state(self, learner: Learner) -> dict[str, Any]:
        """What a checkpoint of this learner holds beside its optimizer."""

    @abstractmethod
    def load_state(self, learner: Learner, state: dict[str, Any]) -> None:
        """Take up such a state."""

    def drop(self, learner: Learner) -> None:  # noqa: B027
        """A learner diverged; the others go on."""

    @abstractmethod
    def finish(self, learner: Learner) -> Outcome:
        """Write the finished model and what goes beside it; say how it ended."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a recipe, flat."""

    stage: Stage
    seed: int
    updates: int
    accumulation: int
    gradient: Literal["summed", "averaged", "rescaled"]
    learning_rate: LearningRate
    log_every: int
    validate_every: int | Literal["epoch"]
    checkpoint_every: int | float
    """Updates between checkpoints (int), or seconds (float)."""
    progress: str = ""
    validate_first: bool = False
    prefetch: int = 1
    readers: int = 1


REPEAT_SECONDS = 2.0
"""Under a launcher a request may come twice: from the scheduler and passed on by the launcher."""


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask to stop after this update.

    A second SIGINT or SIGTERM quits at once; under a launcher (torchrun, submitit, SLURM) it is the
    same request within `REPEAT_SECONDS` of the first. SIGUSR1, SLURM's warning before it ends a
    job, asks what SIGTERM asks and never quits: the SIGTERM that follows is no second request.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._asked: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        first = not self.signal_number
        if first:
            self.signal_number = signal.SIGTERM if number == signal.SIGUSR1 else number
        if number != signal.SIGUSR1:
            now = time.monotonic()
            if self._asked is None:
                self._asked = now
            elif not (under_launcher() and now - self._asked < REPEAT_SECONDS):
                os._exit(128 + number)
        if first and int(os.environ.get("RANK", "0")) == 0:
            # not print: the signal may have come in the middle of one
            os.write(2, b"\nstopping after this update; once more quits at once\n")


class Loop:
    """Trains a task's learners from where they are to the last update.

    Args:
        task: what is trained.
        learners: its runs; all start at the same update.
        speech: training utterances.
        plan: update -> micro-batches.
        settings: of the loop.
        ranks: the processes.
    """

    def __init__(
        self,
        task: Task,
        learners: Sequence[Learner],
        speech: Speech,
        plan: Plan,
        settings: LoopSettings,
        ranks: Ranks,
    ) -> None:
        self.task, self.learners, self.speech, self.plan = task, list(learners), speech, plan
        self.settings, self.ranks = settings, ranks
        self.started = self.saved = time.monotonic()
        self.checkpoints = CheckpointWriter()

    # ------------------------------------------------------------------------------------ running

    def run(self) -> None:
        """Train, validate, checkpoint; write every learner's record.

        Raises:
            InterruptedRun: SIGINT or SIGTERM, after a checkpoint or at the run's end.
        """
        first = self._resume() + 1
        for learner in self.learners:
            learner.record.updates = first - 1
            self._write_record(learner, "running")
        last = self.settings.updates
        bar = tqdm(
            total=last,
            initial=first - 1,
            desc=self.settings.progress,
            unit="upd",
            disable=None if self.ranks.main else True,
            dynamic_ncols=True,
            leave=False,
        )
        batches = prefetch(
            self._look_ahead,
            first,
            last,
            ahead=self.settings.prefetch,
            readers=self.settings.readers,
        )
        if first == 1 and self.settings.validate_first:
            self._validate(0)
        with StopRequest() as stop, bar, closing(batches), closing(self.checkpoints):
            for update in range(first, last + 1):
                number = self._update(update, next(batches), stop)
                bar.update()
                if not any(learner.active for learner in self.learners):
                    break
                self._rows(update, bar)
                if self._checkpoint_due(update) or update == last or number:
                    self._checkpoint(update)
                self.checkpoints.check()
                if number and update < last:
                    self.checkpoints.wait()
                    self.ranks.barrier()
                    self._interrupted(update, number)
            for learner in self.learners:
                if learner.active:
                    self._finish(learner)
        if number := max(self.ranks.gather(stop.signal_number)):
            raise InterruptedRun(
                "stopped at the end of the run",
                where=", ".join(learner.name for learner in self.learners),
                do="run the same command again to go on with what is left",
                signal_number=number,
            )

    def _look_ahead(self, update: int) -> tuple[list[Batch], Any]:
        """This rank's micro-batches of an update, and what the task makes of them beforehand."""
        micro = self.plan.update(update)
        mine = self.ranks.mine(micro)
        seed = self.settings.seed
        batches = [
            self.speech.collate(b, generator(seed, "crop", update, j)).pinned(self.ranks.device)
            for j, b in mine
        ]
        return batches, self.task.look_ahead(update, micro, [j for j, _ in mine])

    def _update(self, update: int, made: tuple[list[Batch], Any], stop: StopRequest) -> int:
        """One optimizer step; returns the signal that any rank received."""
        settings, ranks = self.settings, self.ranks
        micro = self.plan.update(update)
        active = [learner for learner in self.learners if learner.active]
        batches, ahead = made
        self.task.begin_update(update, micro, ahead)
        counts = self.task.counts(micro)
        weights = micro_batch_weights(settings.gradient, counts, settings.accumulation)
        divisor = float(max(1, sum(counts))) if weights is None else 1.0
        for learner in active:
            learner.optimizer.zero_grad(set_to_none=True)
        totals = _Totals(self.task.metric_names, [a.name for a in active], ranks.device)
        for (index, _), batch in zip(ranks.mine(micro), batches, strict=True):
            torch.manual_seed(derive_seed(settings.seed, "forward", update, index))
            terms = self.task.forward(update, index, batch)
            loss = torch.stack([terms[learner.name].loss for learner in active]).sum()
            if loss.requires_grad:
                (loss if weights is None else loss * weights[index]).backward()  # type: ignore[no-untyped-call]
            totals.add(terms)
        gradients = [learner.gradients() for learner in active]
        ranks.sum_([gradient for group in gradients for gradient in group])
        totals.close(stop.signal_number)
        ranks.sum_([totals.values])
        for group in gradients:
            torch._foreach_div_(group, divisor)
        norms = [torch.nn.utils.get_total_norm(group) for group in gradients]
        values, number, grad_norms = totals.read(norms)  # waits for the device
        inspected = self.task.inspect(update, weights, divisor)
        seconds = sum(sum(self.speech.lengths(batch)) for batch in micro) / 16000
        rate = settings.learning_rate(update)
        for learner, group, grad_norm in zip(active, gradients, grad_norms, strict=True):
            learner.audio_seconds += seconds
            sums = values[learner.name]
            if not (math.isfinite(grad_norm) and all(math.isfinite(s) for s, _ in sums.values())):
                self._diverged(learner, update, micro)
                continue
            for name, (total, count) in sums.items():
                learner.means.add(name, total, count)
            learner.means.add("grad_norm", grad_norm, 1.0)
            for name, value in inspected.items():
                if isinstance(value, float):
                    learner.means.add(name, value, 1.0)
            if learner.clip_norm is not None:
                scale = min(1.0, learner.clip_norm / (grad_norm + 1e-6))
                torch._foreach_mul_(group, scale)
            for options in learner.optimizer.param_groups:
                options["lr"] = rate
            learner.optimizer.step()
        self.task.end_update(update, ranks)
        return number

    # ------------------------------------------------------------------------------------ metrics

    def _rows(self, update: int, bar: Any) -> None:
        """The train row and the validation row that are due after an update."""
        settings = self.settings
        active = [learner for learner in self.learners if learner.active]
        within = self.plan.update_in_epoch(update)
        if within % settings.log_every == 0 or (update == settings.updates and not self._logged()):
            for learner in active:
                row: Row = {
                    **{k: v for k, v in learner.means.means().items() if k in self._columns},
                    **{k: learner.means.sums.get(k, 0.0) for k in self.task.total_names},
                    **self.task.values(update, learner),
                    "learning_rate": settings.learning_rate(update),
                    "audio_seconds": learner.audio_seconds,
                }
                self._append(learner, update, "train", row)
                learner.means.clear()
        every = settings.validate_every
        due = self.plan.ends_epoch(update) if every == "epoch" else update % every == 0
        if due or update == settings.updates:
            self._validate(update)
        bar.set_postfix_str(_postfix(active))

    def _validate(self, update: int) -> None:
        """The validation row of an update for all learners that are still there."""
        active = {learner.name: learner for learner in self.learners if learner.active}
        started = time.monotonic()
        found = self.task.validate(update, self.ranks)
        seconds = time.monotonic() - started
        for name, row in found.items():
            active[name].validation_seconds += seconds
            self._append(active[name], update, "valid", row)

    def _logged(self) -> bool:
        """Whether any train row exists; an epoch's last updates may then go unprinted, as run."""
        return self.plan.epoch_end == "short" and any("train" in a.last for a in self.learners)

    @property
    def _columns(self) -> tuple[str, ...]:
        return METRIC_COLUMNS[self.settings.stage]

    def _append(self, learner: Learner, update: int, split: str, values: Row) -> None:
        row: Row = {"update": update, "split": split, **values}
        learner.last[split] = row
        if self.ranks.main:
            learner.metrics.append(row | {"wall_seconds": self._wall(learner)})

    def _wall(self, learner: Learner) -> float:
        """Active seconds over all continuations."""
        return learner.earlier_seconds + time.monotonic() - self.started

    # -------------------------------------------------------------------------- stopping, going on

    def _checkpoint_due(self, update: int) -> bool:
        """By the clock of the main rank, which alone saves; or by the number of updates."""
        every = self.settings.checkpoint_every
        if isinstance(every, int):
            return update % every == 0
        return time.monotonic() - self.saved >= every

    def _checkpoint(self, update: int) -> None:
        """Begin to save the state after this update; the other ranks go on at once."""
        self.saved = time.monotonic()
        if not self.ranks.main:
            return
        states = [
            (
                learner.run.checkpoints,
                {
                    "update": update,
                    "task": self.task.state(learner),
                    "optimizer": learner.optimizer.state_dict(),
                    "means": learner.means.state(),
                    "last": learner.last,
                    "metrics_size": learner.metrics.size,
                    "audio_seconds": learner.audio_seconds,
                    "wall_seconds": self._wall(learner),
                    "validation_seconds": learner.validation_seconds,
                },
            )
            for learner in self.learners
            if learner.active
        ]
        self.checkpoints.save(update, states)

    def _resume(self) -> int:
        """Take up the newest checkpoint that all learners have; the update it was made after."""
        common: list[int] = []
        if self.ranks.main:
            found = [set(checkpoint_updates(a.run.checkpoints)) for a in self.learners]
            common = sorted(set.intersection(*found)) if found else []
        update = self.ranks.gather(common[-1] if common else 0)[0]
        for learner in self.learners:
            if self.ranks.main:
                drop_later_checkpoints(learner.run.checkpoints, update)
                for folder in (learner.run.root, learner.run.model):
                    for half_written in folder.glob(".*.tmp"):  # by a process that was killed
                        half_written.unlink()
            if update:
                folder = learner.run.checkpoints
                state = load_checkpoint(folder, update, self.ranks.device)
                self.task.load_state(learner, state["task"])
                learner.optimizer.load_state_dict(state["optimizer"])
                learner.means.load(state["means"])
                learner.last = state["last"]
                learner.audio_seconds = state["audio_seconds"]
                learner.earlier_seconds += state["wall_seconds"]
                learner.validation_seconds = state.get("validation_seconds", 0.0)
                if self.ranks.main:
                    learner.metrics.restart(state["metrics_size"])
            elif self.ranks.main:
                learner.metrics.restart()
        return update

    def _interrupted(self, update: int, number: int) -> None:
        for learner in self.learners:
            if learner.active:
                name = signal.Signals(number).name
                learner.record.reason = f"{name} after update {update}"
                self._write_record(learner, "interrupted", update)
        names = ", ".join(learner.name for learner in self.learners)
        raise InterruptedRun(
            f"stopped after update {update} of {self.settings.updates}; checkpoint saved",
            where=names,
            do="run the same command again to go on from there",
            signal_number=number,
        )

    def _diverged(self, learner: Learner, update: int, micro: list[list[int]]) -> None:
        """Stop this learner before the step and say on which utterances."""
        learner.active = False
        ids = [self.speech.ids[i] for batch in micro for i in batch]
        learner.record.outcome = "diverged"
        learner.record.reason = (
            f"loss or gradient not finite at update {update}; utterances: {', '.join(ids)}"
        )
        self._write_record(learner, "failed", update - 1)
        self.task.drop(learner)
        if self.ranks.main:
            tqdm.write(f"{learner.name}: diverged at update {update}", file=sys.stderr)

    def _finish(self, learner: Learner) -> None:
        learner.record.outcome = self.task.finish(learner)
        diverged = learner.record.outcome == "diverged"
        if diverged:
            learner.record.reason = "validation loss not finite after the last update"
        self._write_record(learner, "failed" if diverged else "finished", self.settings.updates)
        if self.ranks.main:
            self.checkpoints.wait()
            shutil.rmtree(learner.run.checkpoints, ignore_errors=True)
        self.ranks.barrier()

    def _write_record(self, learner: Learner, status: Status, update: int | None = None) -> None:
        record = learner.record
        record.status = status
        record.updates_planned = self.settings.updates
        record.wall_seconds = self._wall(learner)
        record.validation_seconds = learner.validation_seconds
        record.final = {
            split: {k: v for k, v in row.items() if isinstance(v, int | float)}
            for split, row in learner.last.items()
        }
        if update is not None:
            record.updates = update
            record.ended = now()
        if self.ranks.main:
            record.write(learner.run.record)
            if learner.curves is not None:
                learner.curves.session(record)


class _Totals:
    """Sums and counts of an update for all learners in one tensor, so that ranks meet once.

    What the host knows waits there: nobody waits for the device before the update ends.
    """

    def __init__(self, names: Sequence[str], learners: Sequence[str], device: torch.device) -> None:
        self.names, self.learners = list(names), list(learners)
        size = len(self.learners) * len(self.names) * 2 + 2
        self.values = torch.zeros(size, dtype=torch.float64, device=device)
        self.known, self.nothing = [0.0] * size, self.values.new_zeros(())

    def add(self, terms: Mapping[str, Terms]) -> None:
        flat: list[Tensor | float] = []
        for learner in self.learners:
            metrics = terms[learner].metrics
            unknown = metrics.keys() - set(self.names)
            if unknown:
                raise KeyError(f"metrics not in metric_names: {sorted(unknown)}")
            for name in self.names:
                flat.extend(metrics.get(name, (0.0, 0.0)))
        computed = [self.nothing] * len(flat)
        for place, value in enumerate(flat):
            if isinstance(value, Tensor) and value.device == self.values.device:
                computed[place] = value.detach().double()
            else:
                self.known[place] += float(value)
        self.values[:-2] += torch.stack(computed)

    def close(self, number: int) -> None:
        """Nothing more is added but the signal that arrived.

        SIGINT and SIGTERM are counted apart, so that ranks agree on which arrived.
        """
        self.known[-2] = float(number == signal.SIGINT)
        self.known[-1] = float(number == signal.SIGTERM)
        device = self.values.device
        known = torch.tensor(self.known, dtype=torch.float64, pin_memory=device.type == "cuda")
        self.values += known.to(device, non_blocking=True)

    def read(
        self, more: Sequence[Tensor]
    ) -> tuple[dict[str, dict[str, tuple[float, float]]], int, list[float]]:
        """Learner -> name -> (sum, count); the signal that any rank received (0: none); and what
        else is wanted from the device, scalars, at the same time."""
        known = len(self.values)
        read = torch.cat([self.values, *(value.double()[None] for value in more)]).tolist()
        *flat, interrupt, terminate = read[:known]
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for learner in self.learners:
            found[learner] = {}
            for name in self.names:
                total, count, *flat = flat
                found[learner][name] = (total, count)
        number = int(signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0)
        return found, number, read[known:]


def _postfix(learners: Sequence[Learner]) -> str:
    """Losses for the progress bar."""
    parts = []
    for learner in learners:
        loss = "contrastive_loss" if learner.run.stage == "pretrain" else "ctc_loss"
        shown = []
        for split, row in learner.last.items():
            value = row.get(loss)
            if isinstance(value, float):
                shown.append(f"{split} {value:.3f}")
        label = f"{learner.run.arm} " if len(learners) > 1 else ""
        parts.append(label + " ".join(shown))
    return ", ".join(parts[:3])
