"""A stage's own loop over its own data, updates alone: what several benchmarks time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reproduce.recipe.schema import Recipe
from reproduce.records import RunRecord, Stage, WorkFolder
from reproduce.tasks import bank, pretraining
from reproduce.tasks.context import open_context
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Loop

Around = Callable[[Callable[[], int]], int]
"""Is given an update to run, and returns what that returns."""


@contextmanager
def copy_of_data(work: Path) -> Iterator[WorkFolder]:
    """A work folder for runs that nobody keeps, with the prepared data of another."""
    with TemporaryDirectory() as folder:
        copy = WorkFolder(Path(folder))
        shutil.copytree(work / "data", copy.data)
        yield copy


def run_updates(
    recipe: Recipe, work: WorkFolder, ranks: Ranks, stage: Stage, arm: str, around: Around
) -> None:
    """Train an arm of seed 1 anew, optimizer included; validation and checkpoints are left out."""

    class UpdatesAlone(Loop):
        def _update(self, *given: Any) -> int:
            return around(lambda: super(UpdatesAlone, self)._update(*given))

        def _validate(self, update: int) -> None:
            pass

        def _checkpoint(self, update: int) -> None:
            pass

        def _finish(self, learner: Any) -> None:
            pass

    context = open_context(recipe, work, ranks, stage)
    run = work.run(stage, arm, 1)
    shutil.rmtree(run.root, ignore_errors=True)
    run.root.mkdir(parents=True)
    pretraining.Loop = bank.Loop = UpdatesAlone  # type: ignore[misc]
    try:
        if stage == "pretrain":
            pretraining.train_arm(context, arm, 1, RunRecord(arm, 1), "")
        else:
            bank.train_bank(context, [arm], 1, {arm: RunRecord(arm, 1)}, "")
    finally:
        pretraining.Loop = bank.Loop = Loop  # type: ignore[misc]
