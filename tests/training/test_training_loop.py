"""The loop with a task small enough to compute by hand."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reproduce.data.batches import Batch, Plan
from reproduce.errors import InterruptedRun
from reproduce.position import derive_seed
from reproduce.records import Outcome, RunFolder, RunRecord
from reproduce.training import distributed
from reproduce.training import loop as loop_module
from reproduce.training.checkpoint import checkpoint_updates
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Learner, Loop, LoopSettings, Row, Task, Terms
from reproduce.training.schedule import LearningRate

CPU = Ranks(0, 1, torch.device("cpu"))
PEAK = 0.1


class Numbers:
    """In the place of speech: utterance i is the number i."""

    def __init__(self, count: int) -> None:
        self.ids = [f"u{i}" for i in range(count)]

    def lengths(self, positions: Sequence[int]) -> list[int]:
        return [16_000 for _ in positions]

    def collate(self, positions: Sequence[int], rng: Any = None) -> Any:
        values = torch.tensor([[float(i)] for i in positions])
        ids = [self.ids[i] for i in positions]
        return Batch(values, torch.ones(len(ids), dtype=torch.int64), ids, ids)


class Fit(Task):
    """(w - x)^2 summed over numbers, for each learner; dropout-like noise from the global stream.

    ``spoil``: learner and update at which the loss is NaN. ``at``: called in a forward pass.
    """

    metric_names = ("contrastive_loss",)

    def __init__(self, seed: int = 1) -> None:
        self.weights: dict[str, nn.Parameter] = {}
        self.spoil: tuple[str, int] = ("", 0)
        self.draws: dict[tuple[int, int], float] = {}
        self.seen: list[int] = []
        self.dropped: list[str] = []
        self.stop_at = (0, 0)
        self.valid = 1.0

    def begin_update(
        self, update: int, micro_batches: Sequence[Sequence[int]], ahead: None
    ) -> None:
        self.seen.append(update)

    def counts(self, micro_batches: Sequence[Sequence[int]]) -> list[int]:
        return [len(batch) for batch in micro_batches]

    def forward(self, update: int, index: int, batch: Batch) -> dict[str, Terms]:
        draw = float(torch.rand(()))
        self.draws[update, index] = draw
        if (update, index) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        found = {}
        for name, weight in self.weights.items():
            loss = ((weight - batch.waveform + 0.1 * draw) ** 2).sum()
            if (name, update) == self.spoil:
                loss = loss * math.nan
            found[name] = Terms(loss, {"contrastive_loss": (loss, len(batch.ids))})
        return found

    def validate(self, update: int, ranks: Ranks) -> dict[str, Row]:
        return {name: {"contrastive_loss": self.valid} for name in self.weights}

    def state(self, learner: Learner) -> dict[str, Any]:
        return {"weight": self.weights[learner.name].detach().clone()}

    def load_state(self, learner: Learner, state: dict[str, Any]) -> None:
        self.weights[learner.name].data.copy_(state["weight"])

    def drop(self, learner: Learner) -> None:
        self.dropped.append(learner.name)
        del self.weights[learner.name]

    def finish(self, learner: Learner) -> Outcome:
        return "ok" if math.isfinite(self.valid) else "diverged"


class Setup:
    """A loop over made-up numbers in a folder."""

    def __init__(
        self,
        root: Path,
        arms: Sequence[str] = ("a",),
        *,
        updates: int = 7,
        utterances: int = 10,
        log_every: int = 3,
        validate_every: Any = 4,
        checkpoint_every: int | float = 2,
        epoch_end: Any = "carry",
        clip: float | None = None,
    ) -> None:
        self.task = Fit()
        self.learners = []
        for number, arm in enumerate(arms):
            run = RunFolder(root / arm, "pretrain", arm, 1)
            weight = nn.Parameter(torch.tensor(float(number)))
            self.task.weights[run.name] = weight
            optimizer = torch.optim.SGD([weight], lr=1.0)
            self.learners.append(Learner(run, RunRecord(arm, 1), [weight], optimizer, clip))
        self.plan = Plan(utterances, 2, 2, 1, epoch_end)
        self.settings = LoopSettings(
            stage="pretrain",
            seed=1,
            updates=updates,
            accumulation=2,
            gradient="summed",
            learning_rate=LearningRate(PEAK, updates, "constant", 0.0),
            log_every=log_every,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
        )
        speech: Any = Numbers(utterances)
        self.loop = Loop(self.task, self.learners, speech, self.plan, self.settings, CPU)

    def weight(self, arm: str = "a") -> float:
        return float(self.task.weights[f"pretrain/{arm}/seed-1"].detach())


def rows(root: Path, arm: str = "a") -> list[dict[str, str]]:
    with open(root / arm / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def record(root: Path, arm: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / arm / "run.json").read_text())
    return found


def by_hand(setup: Setup, updates: int, clip: float | None = None) -> tuple[float, list[float]]:
    """The weight after so many updates, and the mean loss of each."""
    weight, losses = 0.0, []
    for update in range(1, updates + 1):
        gradient, total, count = 0.0, 0.0, 0
        for index, batch in enumerate(setup.plan.update(update)):
            torch.manual_seed(derive_seed(1, "forward", update, index))
            noise = 0.1 * float(torch.rand(()))
            gradient += sum(2 * (weight - x + noise) for x in batch)
            total += sum((weight - x + noise) ** 2 for x in batch)
            count += len(batch)
        gradient /= count
        if clip is not None:
            gradient *= min(1.0, clip / (abs(gradient) + 1e-6))
        weight -= PEAK * gradient
        losses.append(total / count)
    return weight, losses


@pytest.mark.parametrize("clip", [None, 3.0])
def test_updates_are_sums_divided_once(tmp_path: Path, clip: float | None) -> None:
    setup = Setup(tmp_path, clip=clip)
    setup.loop.run()
    weight, losses = by_hand(setup, 7, clip)
    assert setup.weight() == pytest.approx(weight, rel=1e-5)
    found = [(r["update"], r["split"]) for r in rows(tmp_path)]
    assert found == [
        ("3", "train"), ("4", "valid"), ("6", "train"), ("7", "train"), ("7", "valid"),
    ]  # fmt: skip
    train = [float(r["contrastive_loss"]) for r in rows(tmp_path) if r["split"] == "train"]
    windows = [losses[0:3], losses[3:6], losses[6:7]]
    assert train == pytest.approx([sum(w) / len(w) for w in windows], rel=1e-5)
    assert [r["audio_seconds"] for r in rows(tmp_path) if r["split"] == "train"] == [
        "12", "24", "28",
    ]  # fmt: skip
    found_record = record(tmp_path)
    assert (found_record["status"], found_record["outcome"]) == ("finished", "ok")
    assert found_record["updates"] == found_record["updates_planned"] == 7
    assert found_record["final"]["train"]["contrastive_loss"] == pytest.approx(train[-1])
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    setup = Setup(tmp_path, updates=1, clip=1e-3)
    setup.loop.run()
    numbers = [x for batch in setup.plan.update(1) for x in batch]
    gradient = 2 * (0.1 * sum(setup.task.draws.values()) / 2 - sum(numbers) / len(numbers))
    assert float(rows(tmp_path)[0]["grad_norm"]) == pytest.approx(abs(gradient), rel=1e-5)
    assert abs(setup.weight()) == pytest.approx(PEAK * 1e-3, rel=1e-2)


def test_rows_follow_the_epochs_where_these_end_short(tmp_path: Path) -> None:
    """10 utterances: updates of 2 + 2, 2 + 2 and 2; a train row every second update of an epoch."""
    options: dict[str, Any] = {"epoch_end": "short", "validate_every": "epoch", "log_every": 2}
    Setup(tmp_path, updates=7, **options).loop.run()
    found = [(int(r["update"]), r["split"]) for r in rows(tmp_path)]
    assert found == [
        (2, "train"), (3, "valid"), (5, "train"), (6, "valid"), (7, "valid"),
    ]  # fmt: skip
    assert float(rows(tmp_path)[2]["audio_seconds"]) == 8 + 2 + 8


def interrupted(setup: Setup, update: int, index: int = 1) -> InterruptedRun:
    setup.task.stop_at = (update, index)
    with pytest.raises(InterruptedRun) as caught:
        setup.loop.run()
    return caught.value


@pytest.mark.parametrize("update", [1, 2, 3, 4, 6])
def test_interrupted_runs_go_on(tmp_path: Path, update: int) -> None:
    """Stopped after the update in which the signal came; nothing is lost, nothing comes twice."""
    whole = Setup(tmp_path / "whole")
    whole.loop.run()
    before = signal.getsignal(signal.SIGTERM)
    error = interrupted(Setup(tmp_path / "cut"), update)
    assert signal.getsignal(signal.SIGTERM) is before
    assert error.exit_code == 143
    assert "run the same command again" in str(error)
    found = record(tmp_path / "cut")
    assert (found["status"], found["updates"]) == ("interrupted", update)
    assert found["reason"] == f"SIGTERM after update {update}"
    assert checkpoint_updates(tmp_path / "cut" / "a" / "checkpoints")[0] == update

    again = Setup(tmp_path / "cut")
    again.loop.run()
    assert again.task.seen == list(range(update + 1, 8))
    assert again.weight() == whole.weight()
    for ours, theirs in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        assert ours | {"wall_seconds": ""} == theirs | {"wall_seconds": ""}
    assert record(tmp_path / "cut")["status"] == "finished"


def test_a_signal_in_the_last_update_is_not_lost(tmp_path: Path) -> None:
    """The run is finished, and the command stops before the next one."""
    error = interrupted(Setup(tmp_path), 7)
    assert error.exit_code == 143
    assert record(tmp_path)["status"] == "finished"


def test_a_signal_while_the_model_is_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path)

    def finish(learner: Learner) -> Outcome:
        os.kill(os.getpid(), signal.SIGINT)
        return "ok"

    monkeypatch.setattr(setup.task, "finish", finish)
    with pytest.raises(InterruptedRun) as caught:
        setup.loop.run()
    assert caught.value.exit_code == 130
    assert record(tmp_path)["status"] == "finished"


class Quit(Exception):
    """In the place of the end of the process."""


@pytest.fixture
def quits(monkeypatch: pytest.MonkeyPatch) -> None:
    def quit_now(code: int) -> None:
        raise Quit(code)

    monkeypatch.setattr(loop_module.os, "_exit", quit_now)
    for name in distributed.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("quits")
def test_a_second_signal_quits_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with loop_module.StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        assert "once more quits at once" in capfd.readouterr().err
        with pytest.raises(Quit, match="130"):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("quits")
@pytest.mark.parametrize("launcher", distributed.LAUNCHERS)
def test_under_a_launcher_a_repeat_is_the_same_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], launcher: str
) -> None:
    monkeypatch.setenv(launcher, "2")
    monkeypatch.setattr(loop_module, "REPEAT_SECONDS", 0.2)
    with loop_module.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher makes of it
        assert stop.signal_number == signal.SIGTERM
        assert capfd.readouterr().err.count("stopping after this update") == 1
        time.sleep(0.3)
        with pytest.raises(Quit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("quits")
def test_a_warning_never_quits() -> None:
    """SLURM's SIGUSR1 asks what SIGTERM asks; the SIGTERM that follows is the first of its kind."""
    with loop_module.StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert stop.signal_number == signal.SIGTERM
        with pytest.raises(Quit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_wall_seconds_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Active time: what passed between two processes doesn't count."""
    clock = [100.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(loop_module.time, "monotonic", tick)
    interrupted(Setup(tmp_path), 5)  # validated after 4, and after 7
    so_far, validated = (record(tmp_path)[f"{what}_seconds"] for what in ("wall", "validation"))
    assert 0 < validated < so_far
    clock[0] += 10_000.0
    Setup(tmp_path).loop.run()
    walls = [float(r["wall_seconds"]) for r in rows(tmp_path)]
    assert walls == sorted(walls)
    assert so_far < record(tmp_path)["wall_seconds"] < 1000
    assert validated < record(tmp_path)["validation_seconds"] < record(tmp_path)["wall_seconds"]


@pytest.mark.parametrize(
    ("every", "expected"), [(2.5, [3, 6, 7]), (1e9, [7]), (0.0, [1, 2, 3, 4, 5, 6, 7])]
)
def test_checkpoints_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, expected: list[int]
) -> None:
    """An update takes a second by this clock: 2.5 s are three updates. The last update always."""
    setup, saved = Setup(tmp_path, checkpoint_every=every), list[int]()
    monkeypatch.setattr(setup.loop, "saved", 0.0)
    clock = SimpleNamespace(monotonic=lambda: float(setup.task.seen[-1]) if setup.task.seen else 0)
    monkeypatch.setattr(loop_module, "time", clock)
    save = setup.loop._checkpoint
    monkeypatch.setattr(setup.loop, "_checkpoint", lambda k: (saved.append(k), save(k)))
    setup.loop.run()
    assert saved == expected
    assert record(tmp_path)["status"] == "finished"


def test_resuming_skips_a_damaged_checkpoint_and_forgets_it(tmp_path: Path) -> None:
    whole = Setup(tmp_path / "whole")
    whole.loop.run()
    interrupted(Setup(tmp_path / "cut", checkpoint_every=1), 6)
    folder = tmp_path / "cut" / "a" / "checkpoints"
    (folder / "update-6" / "state.pt").write_bytes(b"")
    (tmp_path / "cut" / "a" / ".run.json.1.tmp").write_text("half")
    again = Setup(tmp_path / "cut")
    with pytest.warns(UserWarning, match="update-6 is damaged"):
        again.loop.run()
    assert again.task.seen == [6, 7]
    assert again.weight() == whole.weight()
    assert len(rows(tmp_path / "cut")) == len(rows(tmp_path / "whole"))
    assert not list((tmp_path / "cut" / "a").glob(".*.tmp"))


# ----------------------------------------------------------------------------- several learners


def test_a_learner_that_diverges_leaves_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops before the step and names the utterances; the others train as without it."""
    alone = Setup(tmp_path / "alone")
    alone.loop.run()
    bank = Setup(tmp_path / "bank", ["a", "b", "c"])
    bank.task.spoil = ("pretrain/b/seed-1", 4)
    held = bank.task.weights["pretrain/b/seed-1"]
    bank.loop.run()
    assert bank.task.dropped == ["pretrain/b/seed-1"]
    assert bank.weight("a") == alone.weight("a")
    ours, theirs = (record(tmp_path / name, arm) for name, arm in (("bank", "a"), ("alone", "a")))
    assert ours["final"] == theirs["final"]
    found = record(tmp_path / "bank", "b")
    assert (found["status"], found["outcome"], found["updates"]) == ("failed", "diverged", 3)
    for batch in bank.plan.update(4):
        for utterance in batch:
            assert f"u{utterance}" in found["reason"]
    assert "update 4" in found["reason"]
    assert [r["update"] for r in rows(tmp_path / "bank", "b")] == ["3"]
    assert "pretrain/b/seed-1: diverged at update 4" in capsys.readouterr().err

    three = Setup(tmp_path / "three", ["a", "b"], updates=3)
    three.loop.run()
    assert float(held.detach()) == three.weight("b")  # the weights of before


@pytest.mark.parametrize("update", [2, 7])
def test_all_learners_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    """Nothing is validated any more, also where that is due at this very update."""
    setup = Setup(tmp_path)
    setup.task.spoil = ("pretrain/a/seed-1", update)
    validate, validated = setup.task.validate, []

    def spy(update: int, ranks: Ranks) -> dict[str, Row]:
        validated.append(update)
        return validate(update, ranks)

    monkeypatch.setattr(setup.task, "validate", spy)
    setup.loop.run()
    assert setup.task.seen == list(range(1, update + 1))
    assert update not in validated
    assert record(tmp_path)["outcome"] == "diverged"


def test_validation_that_is_not_finite_is_diverged(tmp_path: Path) -> None:
    """The last step spoiled the weights, and no update came after it to notice."""
    setup = Setup(tmp_path)
    setup.task.valid = math.nan
    setup.loop.run()
    found = record(tmp_path)
    assert (found["status"], found["outcome"]) == ("failed", "diverged")
    assert "validation" in found["reason"]
    assert found["final"]["valid"]["contrastive_loss"] is None


def test_learners_go_on_from_their_newest_common_checkpoint(tmp_path: Path) -> None:
    """One was killed between the two savings: the other goes back, and forgets what it had."""
    whole = Setup(tmp_path / "whole", ["a", "b"])
    whole.loop.run()
    interrupted(Setup(tmp_path / "cut", ["a", "b"]), 4)
    folder = tmp_path / "cut" / "b" / "checkpoints"
    os.rename(folder / "update-4", tmp_path / "gone")
    again = Setup(tmp_path / "cut", ["a", "b"])
    again.task.stop_at = (5, 1)
    with pytest.raises(InterruptedRun):
        again.loop.run()
    assert again.task.seen == [3, 4, 5]
    assert checkpoint_updates(tmp_path / "cut" / "a" / "checkpoints") == [5, 4]
    Setup(tmp_path / "cut", ["a", "b"]).loop.run()
    for arm in ("a", "b"):
        for ours, theirs in zip(
            rows(tmp_path / "cut", arm), rows(tmp_path / "whole", arm), strict=True
        ):
            assert ours | {"wall_seconds": ""} == theirs | {"wall_seconds": ""}


# ------------------------------------------------------------------------------- random streams


def test_dropout_depends_on_the_position_alone(tmp_path: Path) -> None:
    """Whatever was drawn before, and whichever process computes a micro-batch."""
    first, second = Setup(tmp_path / "1"), Setup(tmp_path / "2")
    first.loop.run()
    torch.manual_seed(1234)
    second.settings = first.settings
    interrupted(second, 3)
    resumed = Setup(tmp_path / "2")
    resumed.loop.run()
    assert second.task.draws | resumed.task.draws == first.task.draws
    assert len(set(first.task.draws.values())) == len(first.task.draws)


def test_no_thread_is_left(tmp_path: Path) -> None:
    Setup(tmp_path / "whole").loop.run()
    interrupted(Setup(tmp_path / "cut"), 2)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ThreadPoolExecutor")]
