"""What both training stages make of a recipe: plan, schedule, optimizer, speech."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from reproduce.data.audio import SAMPLE_RATE
from reproduce.data.batches import Buckets, Plan, Speech
from reproduce.model.encoder import Encoder
from reproduce.position import generator
from reproduce.recipe import schema
from reproduce.recipe.schema import Finetune, Pretrain
from reproduce.tasks.context import Context
from reproduce.training.loop import LoopSettings
from reproduce.training.schedule import LearningRate


def plan_of(section: schema.Stage, lengths: np.ndarray, seed: int) -> Plan:
    """Update -> micro-batches of utterances of these lengths, samples [N]."""
    buckets = None
    if section.batches == "bucketed":
        seconds = section.batch_seconds
        samples = None if seconds is None else round(seconds * SAMPLE_RATE)
        buckets = Buckets(lengths, section.batch_size, samples)
    return Plan(
        len(lengths), section.batch_size, section.accumulation, seed, section.epoch_end, buckets
    )


def learning_rate_of(section: schema.Stage, plan: Plan) -> LearningRate:
    """The schedule over the run's updates, or over its micro-batches where it counts those."""
    schedule = section.schedule
    steps = section.updates
    if schedule.counted_in == "micro_batches":
        steps = plan.micro_batches(section.updates)
    return LearningRate(
        section.optimizer.learning_rate,
        round(schedule.length * steps),
        schedule.kind,
        schedule.warmup,
        schedule.hold,
        schedule.decay,
        schedule.decay_form,
        schedule.final_scale,
    )


def loop_settings(
    section: schema.Stage,
    stage: Literal["pretrain", "finetune"],
    seed: int,
    plan: Plan,
    label: str,
    compute: schema.Compute,
) -> LoopSettings:
    every = section.checkpoint_every
    return LoopSettings(
        stage=stage,
        seed=seed,
        updates=section.updates,
        accumulation=section.accumulation,
        gradient=section.gradient,
        learning_rate=learning_rate_of(section, plan),
        log_every=section.log_every,
        validate_every=section.validation.every,
        validate_first=isinstance(section, Pretrain) and section.validation.initial,
        checkpoint_every=every if isinstance(every, int) else schema.duration_seconds(every),
        progress=label,
        prefetch=compute.prefetch,
        readers=compute.readers,
    )


def adamw(parameters: Iterable[nn.Parameter], section: schema.Stage) -> torch.optim.AdamW:
    """AdamW over all parameters alike; the loop sets the rate."""
    options = section.optimizer
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def speech_of(context: Context, section: schema.Stage, split: str) -> Speech:
    """The utterances a stage trains or validates on."""
    subset = section.subset if isinstance(section, Finetune) else None
    rows = context.manifest.select(
        split=split,
        subset=subset or context.recipe.data.subset,
        min_seconds=section.min_seconds or None,
        max_seconds=section.max_seconds,
    )
    if split == "valid" and section.validation.max_utterances is not None:
        chosen = generator(0, "validation").permutation(len(rows))
        rows = rows.take(np.sort(chosen[: section.validation.max_utterances]))
    if isinstance(section, Pretrain):
        return Speech(
            rows,
            context.manifest.audio,
            crop_seconds=section.crop_seconds,
            crop=section.crop,
            what=f"{split} utterance",
        )
    return Speech(rows, context.manifest.audio, what=f"{split} utterance")


def compile_encoder(context: Context, encoder: Encoder) -> None:
    """torch.compile where the recipe says so."""
    if context.recipe.compute.compile:
        encoder.compile()


def autocast(context: Context) -> AbstractContextManager[Any]:
    """bf16 autocast where the recipe says so."""
    return torch.autocast(
        context.ranks.device.type,
        torch.bfloat16,
        enabled=context.recipe.compute.precision == "bf16",
    )
