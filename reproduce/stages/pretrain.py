"""pretrain: the grid of the recipe over the one loop."""

from __future__ import annotations

from collections.abc import Sequence

from reproduce.grid.claiming import run_grid
from reproduce.recipe.schema import Recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.tasks.context import open_context
from reproduce.tasks.pretraining import PretrainTask, train_arm
from reproduce.training.distributed import Ranks


def pretrain(
    recipe: Recipe,
    work: WorkFolder,
    ranks: Ranks,
    arms: Sequence[str],
    seeds: Sequence[int],
    task: type[PretrainTask] = PretrainTask,
) -> None:
    """Every arm x seed given; skips what is finished, continues what was cut off.

    Args:
        task: what is trained: `PretrainTask` or a class of one's own that stands on it.
    """
    context = open_context(recipe, work, ranks, "pretrain")
    units = [([arm], seed) for seed in seeds for arm in arms]

    def train(arms: list[str], seed: int, records: dict[str, RunRecord], label: str) -> None:
        train_arm(context, arms[0], seed, records[arms[0]], label, task)

    run_grid(context, units, train)
