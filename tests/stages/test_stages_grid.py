"""The grid: what is due, what is skipped, what is refused, and how it ends."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import make_work, rows, tiny_recipe

from reproduce import errors
from reproduce.errors import (
    DataError,
    DivergedError,
    FailedRunsError,
    InterruptedRun,
    UsageError,
    W2vrepError,
)
from reproduce.grid import claiming
from reproduce.grid import lock as lock_module
from reproduce.grid.lock import RunLock
from reproduce.recipe import load_recipe
from reproduce.recipe.schema import Recipe
from reproduce.records import RunFolder, RunRecord, WorkFolder
from reproduce.stages.pretrain import pretrain as stage
from reproduce.training import distributed

GRID = """
pretrain:
  updates: 3
  log_every: 1
  validation: {every: 3}
  arms:
    first: {}
    wild: {optimizer.learning_rate: 1.0e+30}
    last: {}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("grid"), train=9)


@pytest.fixture
def work(prepared: WorkFolder, tmp_path: Path) -> WorkFolder:
    shutil.copytree(prepared.root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "grid.yaml").write_text(GRID)
    return WorkFolder(tmp_path)


def grid(work: WorkFolder) -> Recipe:
    return load_recipe(f"corrected+{work.root / 'size.yaml'}+{work.root / 'grid.yaml'}")


def pretrain(recipe: Recipe, work: WorkFolder, arms: Sequence[str] = ("first",)) -> None:
    threads = torch.get_num_threads()
    try:
        stage(recipe, work, distributed.start("cpu"), arms, [1])
    finally:
        torch.set_num_threads(threads)


def record(work: WorkFolder, arm: str = "first") -> RunRecord:
    return RunRecord.read(work.run("pretrain", arm, 1).record)


def test_a_diverged_run_does_not_stop_the_grid(
    work: WorkFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = grid(work)
    with pytest.raises(DivergedError, match="1 of the runs diverged: pretrain/wild/seed-1") as end:
        pretrain(recipe, work, ["first", "wild", "last"])
    assert end.value.exit_code == 4
    told = capsys.readouterr().err
    assert "pretrain/wild/seed-1: failed, diverged" in told
    assert told.index("pretrain/wild/seed-1: failed") < told.index("pretrain/last/seed-1: finished")
    for arm in ("first", "last"):
        assert record(work, arm).status == "finished"

    wild = record(work, "wild")
    assert (wild.status, wild.outcome, wild.updates) == ("failed", "diverged", 1)
    update, ids = wild.reason.split("; utterances: ")
    assert update == "loss or gradient not finite at update 2"
    assert len(ids.split(", ")) == 7  # 4 x 2, one of them the short end of a length bucket
    assert all(name.startswith("u") for name in ids.split(", "))
    assert [r["update"] for r in rows(work.run("pretrain", "wild", 1))] == ["1"]
    assert not work.run("pretrain", "wild", 1).model.exists()

    before = work.run("pretrain", "first", 1).metrics.read_bytes()
    with pytest.raises(DivergedError):  # said again, nothing done again
        pretrain(recipe, work, ["first", "wild", "last"])
    told = capsys.readouterr().err
    assert "pretrain/first/seed-1: finished before" in told
    assert "pretrain/wild/seed-1: diverged before" in told
    assert work.run("pretrain", "first", 1).metrics.read_bytes() == before
    pretrain(recipe, work, ["first", "last"])


def test_a_run_whose_last_step_spoils_it_has_diverged(work: WorkFolder) -> None:
    """No update follows that could notice: the validation does."""
    (work.root / "grid.yaml").write_text(GRID.replace("updates: 3", "updates: 1"))
    with pytest.raises(DivergedError):
        pretrain(grid(work), work, ["wild"])
    found = record(work, "wild")
    assert (found.status, found.outcome) == ("failed", "diverged")
    with pytest.raises(DivergedError):
        pretrain(grid(work), work, ["wild"])


def test_other_settings_are_refused(work: WorkFolder) -> None:
    pretrain(tiny_recipe("corrected", work, "pretrain.updates=1"), work, ["icsl_2cb"])
    other = tiny_recipe("corrected", work, "pretrain.updates=2", "pretrain.icsl.form=squared")
    with pytest.raises(UsageError, match="made with other settings") as refused:
        pretrain(other, work, ["icsl_2cb"])
    assert "pretrain.updates 1 -> 2" in str(refused.value)
    assert 'pretrain.icsl.form "signed" -> "squared"' in str(refused.value)
    # what decides no number may change
    same = tiny_recipe("corrected", work, "pretrain.updates=1", "pretrain.checkpoint_every=7")
    pretrain(same, work, ["icsl_2cb"])


def test_other_data_is_refused(work: WorkFolder) -> None:
    recipe = tiny_recipe("corrected", work, "pretrain.updates=1")
    pretrain(recipe, work, ["icsl_2cb"])
    shutil.rmtree(work.data)
    make_work(work.root, train=8)
    with pytest.raises(UsageError, match="made from other data"):
        pretrain(recipe, work, ["icsl_2cb"])


def test_nothing_prepared(work: WorkFolder) -> None:
    shutil.rmtree(work.data)
    with pytest.raises(DataError, match="w2vrep prepare"):
        pretrain(grid(work), work)


class Elsewhere:
    """Another process that holds the lock of a run, as far as this one can see."""

    def __init__(self, run: RunFolder, started: float = 0.0) -> None:
        run.root.mkdir(parents=True, exist_ok=True)
        self.run, self.lock = run, RunLock(run.lock, started)
        assert self.lock.take() == "taken"

    def dies(self) -> None:
        """No word, no wiping."""
        os.close(self.lock._file)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens while the grid waits before its next pass, one after the other."""
    left: list[Callable[[], object]] = []
    clock = SimpleNamespace(sleep=lambda _: left.pop(0)(), monotonic=time.monotonic)
    monkeypatch.setattr(claiming, "time", clock)
    return left


def test_the_grid_waits_for_a_run_that_another_process_trains(
    work: WorkFolder, capsys: pytest.CaptureFixture[str], passes: list[Callable[[], object]]
) -> None:
    """It does what it can, and ends when the other one is done."""
    recipe, run = grid(work), work.run("pretrain", "first", 1)
    pretrain(recipe, work)
    other = Elsewhere(run)

    def others_are_done() -> None:
        assert record(work, "last").status == "finished"

    passes += [others_are_done, lambda: None, other.lock.release]
    pretrain(recipe, work, ["first", "last"])
    assert passes == []
    told = capsys.readouterr().err
    assert f"pretrain/first/seed-1: process {os.getpid()} on {socket.gethostname()} tra" in told
    assert told.count("waiting for 1 of the runs: pretrain/first/seed-1") == 1
    assert "pretrain/first/seed-1: finished by another process" in told


def test_a_run_whose_process_died_is_taken_up(
    work: WorkFolder, capsys: pytest.CaptureFixture[str], passes: list[Callable[[], object]]
) -> None:
    passes += [Elsewhere(work.run("pretrain", "first", 1)).dies]
    pretrain(grid(work), work)
    assert record(work).status == "finished"
    assert "died; taken up again" in capsys.readouterr().err


def test_two_deaths_over_a_run_are_a_failure_that_the_next_command_tries_again(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this grid, that is: whoever died before it began doesn't count."""
    run = work.run("pretrain", "first", 1)
    Elsewhere(run, time.time()).dies()
    began = time.time()
    for _ in range(2):
        Elsewhere(run, began).dies()
    with monkeypatch.context() as patch:
        patch.setenv(lock_module.STARTED, str(began))
        with pytest.raises(FailedRunsError, match="1 of the runs failed: pretrain/first/s") as end:
            pretrain(grid(work), work, ["first", "last"])
    assert end.value.exit_code == 1
    assert "2 processes died while training it" in record(work).reason
    assert (record(work).status, record(work, "last").status) == ("failed", "finished")
    pretrain(grid(work), work, ["first", "last"])
    assert record(work).status == "finished"


def test_a_run_that_failed_in_another_process_is_told_and_not_tried_again(
    work: WorkFolder, passes: list[Callable[[], object]]
) -> None:
    run = work.run("pretrain", "first", 1)
    other = Elsewhere(run)

    def fails() -> None:
        RunRecord("first", 1, status="failed", reason="RuntimeError: out of luck", **same).write(
            run.record
        )
        other.lock.release(failed=True)

    pretrain(grid(work), work, ["last"])
    found = record(work, "last")
    same: Any = {"recipe_sha256": found.recipe_sha256, "manifest_sha256": found.manifest_sha256}
    passes += [fails]
    with pytest.raises(FailedRunsError, match="RuntimeError: out of luck"):
        pretrain(grid(work), work, ["first", "last"])


def test_where_files_cannot_be_locked_nothing_is_trained(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: None)
    with pytest.raises(UsageError, match="two processes got the same lock") as refused:
        pretrain(grid(work), work)
    assert "NFS 4" in refused.value.do
    assert not work.run("pretrain", "first", 1).root.exists()


def test_what_a_killed_process_could_not_remove(work: WorkFolder) -> None:
    """Killed between the record and the removal of the checkpoints: they go the next time."""
    pretrain(grid(work), work)
    left = work.run("pretrain", "first", 1).checkpoints / "update-3"
    left.mkdir(parents=True)
    pretrain(grid(work), work)
    assert not left.parent.exists()


def test_a_record_that_cannot_be_read(work: WorkFolder) -> None:
    pretrain(grid(work), work)
    work.run("pretrain", "first", 1).record.write_text('{"arm": ')
    with pytest.raises(UsageError, match=r"run\.json can't be read"):
        pretrain(grid(work), work)


def test_an_unexpected_error_is_in_the_record(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("reproduce.tasks.pretraining.PretrainTask.forward", broken)
        with pytest.raises(RuntimeError):
            pretrain(grid(work), work)
    found = record(work)
    assert (found.status, found.reason) == ("failed", "RuntimeError: out of luck")
    started = found.started
    pretrain(grid(work), work)  # and is tried again
    found = record(work)
    assert (found.status, found.reason, found.started) == ("finished", "", started)


def test_record_of_a_finished_run(work: WorkFolder) -> None:
    pretrain(grid(work), work)
    found = json.loads(work.run("pretrain", "first", 1).record.read_text())
    train, valid = rows(work.run("pretrain", "first", 1))[-2:]
    for split, row in (("train", train), ("valid", valid)):
        for name, value in found["final"][split].items():
            assert value == pytest.approx(float(row[name])), name
    assert found["updates"] == found["updates_planned"] == 3
    assert found["wall_seconds"] >= float(valid["wall_seconds"])
    assert (found["world_size"], found["precision"]) == (1, "float32")
    assert found["manifest_sha256"]
    assert found["device"].startswith("cpu")


@pytest.mark.parametrize(
    "error",
    [
        UsageError("found", where="here", do="that"),
        DataError("found"),
        DivergedError("found", do="that"),
        InterruptedRun("found", where="here", signal_number=15),
        errors.RecipeError(["a: b", "c: d"], where="recipe"),
    ],
)
def test_errors_travel_between_processes(error: W2vrepError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
    assert (again.found, again.where, again.do) == (error.found, error.where, error.do)
