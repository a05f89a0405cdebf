"""The demo's pretraining, as shipped but on a third of its corpus, learns something of it.

It needs targets that can be predicted, negatives that aren't the target, gradients that reach the
extractor, and a corpus whose pauses and sounds outlast a mask.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reproduce.recipe import load_recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages.prepare import prepare
from reproduce.stages.pretrain import pretrain
from reproduce.training.distributed import Ranks

SMALLER = ["data.synthetic.hours=0.2", "data.jobs=1", "compute.device=cpu"]


@pytest.mark.parametrize("seed", [1, 3])
def test_the_demo_leaves_chance(tmp_path: Path, seed: int) -> None:
    recipe, work = load_recipe("demo", SMALLER), WorkFolder(tmp_path)
    prepare(recipe, work)
    pretrain(recipe, work, Ranks(0, 1, torch.device("cpu")), ["no_icsl_8cb"], [seed])
    run = work.run("pretrain", "no_icsl_8cb", seed)
    final = RunRecord.read(run.record).final["valid"]
    assert final["chance_loss"] - final["contrastive_loss"] > 0.1  # type: ignore[operator]
    assert final["perplexity"] > 100  # type: ignore[operator]  # of 2560: not by a handful of codes
