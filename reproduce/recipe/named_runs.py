"""Encoders that a recipe names as runs of its own work folder.

``ARM/seed-N`` is a run of pretraining, ``finetune/ARM/seed-N`` one of fine-tuning, from whose
encoder another arm goes on with a new head: so a recipe fine-tunes in several parts.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from reproduce.recipe.schema import Finetune, Recipe


class NamedRun(NamedTuple):
    """A run by its name; ``seed`` as it is written: a number, or ``{seed}``."""

    stage: Literal["pretrain", "finetune"]
    arm: str
    seed: str


def named_run(name: str) -> NamedRun | None:
    """The run that ``finetune.encoder`` names; None: it names something else."""
    match = re.fullmatch(r"(finetune/)?([^/]+)/seed-(.*)", name)
    if match is None:
        return None
    return NamedRun("finetune" if match[1] else "pretrain", match[2], match[3])


def pretrained_arm(recipe: Recipe, section: Finetune) -> str | None:
    """The pretraining arm that an encoder comes from, at first hand or by way of fine-tuned ones;
    None: from none of this recipe.

    Raises:
        ValueError: the arms stand on each other in a circle; the message names them.
    """
    by_way_of: list[str] = []
    while (run := named_run(section.encoder)) is not None:
        if run.stage == "pretrain":
            return run.arm if run.arm in recipe.pretrain.arms else None
        if run.arm in by_way_of:
            raise ValueError(" on ".join([*by_way_of[by_way_of.index(run.arm) :], run.arm]))
        if run.arm not in recipe.finetune.arms:
            return None
        by_way_of.append(run.arm)
        section = recipe.finetune_arm(run.arm)
    return None
