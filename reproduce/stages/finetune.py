"""finetune: the RVQ arms of the recipe over the one loop, as a bank of heads where possible."""

from __future__ import annotations

from collections.abc import Sequence

from reproduce.errors import UsageError
from reproduce.grid.claiming import run_grid
from reproduce.recipe.schema import Recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.tasks.bank import banks, resumable_together, train_bank
from reproduce.tasks.context import open_context
from reproduce.tasks.encoders import settings_of_encoder
from reproduce.training.distributed import Ranks


def finetune(
    recipe: Recipe, work: WorkFolder, ranks: Ranks, arms: Sequence[str], seeds: Sequence[int]
) -> None:
    """Every arm x seed given; arms that can share an encoder's pass train together.

    A run whose encoder is missing is left out and told at the end, see :func:`run_grid`.
    """
    context = open_context(recipe, work, ranks, "finetune", settings_of_encoder)
    for arm in arms:
        if recipe.finetune_arm(arm).rvq.ema == "micro_batch" and ranks.world > 1:
            raise UsageError(
                f"codebooks that move every micro-batch are exact for one process only, "
                f"found {ranks.world}",
                where="finetune.rvq.ema",
                do="run one process, or --set finetune.rvq.ema=update",
            )
    units = [(bank, seed) for seed in seeds for bank in banks(recipe, arms)]

    def train(arms: list[str], seed: int, records: dict[str, RunRecord], label: str) -> None:
        for group in resumable_together(context, arms, seed):
            train_bank(context, group, seed, records, label)

    run_grid(context, units, train)
