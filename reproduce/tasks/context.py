"""What the runs of a grid share: recipe, folder, manifest, processes; threads and precision."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reproduce.data.manifest import Manifest
from reproduce.errors import UsageError
from reproduce.model.precision import set_precision
from reproduce.recipe.schema import Recipe
from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder
from reproduce.tasks.corpus import save_recipe
from reproduce.training.distributed import Ranks
from reproduce.training.memory import keep_freed_memory


@dataclass(frozen=True)
class Context:
    """What the runs of a grid share.

    Attributes:
        more_settings: (recipe, work, seed, arm) -> what decides a run's numbers beside the recipe;
            raises DataError or DivergedError where the run lacks what it stands on.
    """

    recipe: Recipe
    work: WorkFolder
    manifest: Manifest
    ranks: Ranks
    stage: Stage
    more_settings: Callable[[Recipe, WorkFolder, int, str], dict[str, Any]] | None = None

    def settings(self, arm: str, seed: int) -> dict[str, Any]:
        """What decides the numbers of a run, for its hash."""
        settings = self.recipe.settings(self.stage, arm)
        if self.more_settings is not None:
            settings |= self.more_settings(self.recipe, self.work, seed, arm)
        return settings

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, file=sys.stderr, flush=True)


def open_context(
    recipe: Recipe,
    work: WorkFolder,
    ranks: Ranks,
    stage: Stage,
    more_settings: Callable[[Recipe, WorkFolder, int, str], dict[str, Any]] | None = None,
) -> Context:
    """Read the manifest and set up threads and precision.

    Args:
        more_settings: see :class:`Context`.

    Raises:
        DataError: nothing is prepared, or not the training subset that the recipe requires.
    """
    manifest = Manifest.read(work.data)
    manifest.summary.require_subset(recipe.data.subset, recipe.data.subset_sha256)
    if not recipe.data.allow_overlap:
        manifest.require_apart()
    set_up(recipe, ranks)
    section = getattr(recipe, stage)
    if ranks.main:
        save_recipe(recipe, work)
        if ranks.world > section.accumulation:
            print(
                f"warning: {ranks.world} processes share {section.accumulation} micro-batches an "
                f"update: raise {stage}.accumulation and lower {stage}.batch_size",
                file=sys.stderr,
            )
    return Context(recipe, work, manifest, ranks, stage, more_settings)


def set_up(recipe: Recipe, ranks: Ranks) -> None:
    """Threads, memory and precision of this process, as a recipe's ``compute`` says."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    set_precision(recipe.compute.precision)


def read_record(run: RunFolder) -> RunRecord | None:
    """``run.json``, None if there is none yet.

    Raises:
        UsageError: it can't be read.
    """
    if not run.record.exists():
        return None
    try:
        return RunRecord.read(run.record)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"run.json can't be read: {error}",
            where=run.name,
            do="delete this run's folder to train it anew",
        ) from None
