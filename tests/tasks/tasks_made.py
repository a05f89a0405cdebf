"""The two tasks as their stages make them, small, with nothing trained yet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import tiny_recipe

from reproduce.data.manifest import Manifest
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.folders import save_folder
from reproduce.model.interop import encoder_state_to_huggingface
from reproduce.records import RunRecord, Stage, WorkFolder
from reproduce.tasks import bank, pretraining
from reproduce.tasks.context import Context
from reproduce.training.distributed import Ranks


def made(
    stage: Stage, protocol: str, work: WorkFolder, monkeypatch: pytest.MonkeyPatch, *sets: str
) -> Any:
    """The task, its speech and its plan, as the stage makes them, on the CPU."""
    recipe = tiny_recipe(protocol, work, *sets)
    context = Context(
        recipe, work, Manifest.read(work.data), Ranks(0, 1, torch.device("cpu")), stage
    )
    found: list[Any] = []

    def loop(task: Any, learners: Any, speech: Any, plan: Any, *_: Any) -> Any:
        found.append(SimpleNamespace(task=task, learners=learners, speech=speech, plan=plan))
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(pretraining, "Loop", loop)
    monkeypatch.setattr(bank, "Loop", loop)
    if stage == "pretrain":
        pretraining.train_arm(context, "icsl_8cb", 1, RunRecord("icsl_8cb", 1), "")
    else:
        arms = ["no_rvq", "rvq_2", "rvq_4"] if recipe.finetune.train == "head" else ["rvq_2"]
        records = {arm: RunRecord(arm, 1) for arm in arms}
        bank.train_bank(context, arms, 1, records, "")
    return found[0]


def encoder_folder(folder: Path, extractor: str) -> Path:
    """A small encoder of random weights in Hugging Face layout."""
    config = EncoderConfig(
        extractor=extractor,  # type: ignore[arg-type]
        conv_channels=(16,) * 7,
        width=32,
        layers=2,
        heads=2,
        feed_forward=48,
        position_kernel=8,
        position_groups=2,
        layer_drop=0.0,
    )
    encoder = Encoder(config)
    save_folder(folder, config.to_huggingface(), encoder_state_to_huggingface(encoder))
    return folder
