"""A loss of one's own beside the contrastive loss: codebooks are pushed towards orthogonal entries.

    python docs/examples/orthogonality.py corrected+smoke --work runs/orthogonality

Each codebook's unit vectors [V, D/G] get the mean squared cosine of different entries as a penalty.
docs/extending.md goes through this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reproduce.data.batches import Batch
from reproduce.recipe import load_recipe
from reproduce.records import WorkFolder
from reproduce.report import build_report
from reproduce.stages.prepare import prepare
from reproduce.stages.pretrain import pretrain
from reproduce.tasks.pretraining import PretrainTask
from reproduce.training import distributed
from reproduce.training.loop import Terms


def entry_overlap(codebooks: Tensor) -> Tensor:
    """Mean squared cosine of different entries of a codebook, over codebooks: scalar in [0, 1].

    Args:
        codebooks: [G, V, d].
    """
    unit = normalize(codebooks, dim=-1)
    squared = torch.matmul(unit, unit.transpose(1, 2)).square()  # [G, V, V]
    entries = squared.shape[1]
    own = squared.diagonal(dim1=1, dim2=2).sum(dim=1)  # V, but for zero vectors
    return ((squared.sum(dim=(1, 2)) - own) / (entries * (entries - 1))).mean()


class OrthogonalTask(PretrainTask):
    """Pretraining with `entry_overlap` beside the mean loss a frame."""

    weight = 0.1

    def forward(self, update: int, index: int, batch: Batch) -> dict[str, Terms]:
        terms = super().forward(update, index, batch)
        # Losses are summed over the masked frames, and divided once an update: so is this one.
        frames = self.draws.counts[index]
        penalty = entry_overlap(self.model.quantizer.codebooks())
        terms[self.name].loss = terms[self.name].loss + self.weight * frames * penalty
        return terms


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.set)
    work = WorkFolder(options.work)
    ranks = distributed.start("auto")
    prepare(recipe, work)
    pretrain(recipe, work, ranks, ["no_icsl_2cb", "no_icsl_8cb"], recipe.seeds, OrthogonalTask)
    print(build_report([work.root], work.report).page)


if __name__ == "__main__":
    main()
