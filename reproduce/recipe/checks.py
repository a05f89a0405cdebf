"""Combinations of keys that can't work, found before anything runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from pydantic import ValidationError

from reproduce.recipe.schema import Finetune, Masking, Pretrain, Recipe, Schedule


def combination_problems(recipe: Recipe) -> list[str]:
    """Every impossible combination, a line each, beginning with its dotted path."""
    problems = [*_data(recipe), *_model(recipe)]
    if len(set(recipe.seeds)) < len(recipe.seeds):
        problems.append(f"seeds: the same seed twice in {recipe.seeds}")
    for arm in recipe.pretrain.arms:
        try:
            section = recipe.pretrain_arm(arm)
        except ValidationError:
            continue  # its keys are reported one by one
        where = f"pretrain.arms.{arm}" if _own(recipe.pretrain.arms[arm]) else "pretrain"
        problems += [f"{where}: {text}" for text in _pretrain_arm(section)]
    for arm in recipe.finetune.arms:
        try:
            tuned = recipe.finetune_arm(arm)
        except ValidationError:
            continue
        problems += [f"finetune.arms.{arm}: {text}" for text in _finetune_arm(tuned)]
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        problems += [f"{name}.schedule: {text}" for text in _schedule(stage.schedule)]
        problems += [f"{name}.masking: {text}" for text in _masking(stage.masking)]
        if stage.max_seconds is not None and stage.max_seconds <= stage.min_seconds:
            problems.append(
                f"{name}.max_seconds: {stage.max_seconds} is not above min_seconds "
                f"{stage.min_seconds}"
            )
    return [*problems, *_encoder(recipe)]


def _own(overrides: dict[str, object]) -> bool:
    return bool(overrides)


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.transcripts is not None and data.corpus != "folder":
        yield f"data.transcripts: only for corpus folder, found corpus {data.corpus}"
    if data.corpus == "folder" and data.transcripts is None:
        yield "data.transcripts: corpus folder needs a CSV, TSV or JSONL of transcripts"
    if data.corpus == "librispeech" and not data.train_parts:
        yield "data.train_parts: at least one part is needed"
    both = set(data.train_parts) & {*data.valid_parts, *data.test_parts}
    if both:
        yield f"data.train_parts: {', '.join(sorted(both))} is also held out"
    if data.synthetic.min_seconds > data.synthetic.max_seconds:
        yield (
            f"data.synthetic.min_seconds: {data.synthetic.min_seconds} is above max_seconds "
            f"{data.synthetic.max_seconds}"
        )


def _model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.width % model.heads:
        yield f"model.heads: {model.heads} does not divide width {model.width}"
    if model.width % model.position_groups:
        yield f"model.position_groups: {model.position_groups} does not divide width {model.width}"
    sizes = {len(model.conv_channels), len(model.conv_kernels), len(model.conv_strides)}
    if len(sizes) > 1:
        yield "model.conv_channels: conv_channels, conv_kernels and conv_strides differ in length"


def _pretrain_arm(section: Pretrain) -> Iterator[str]:
    quantizer = section.quantizer
    if quantizer.codevector_dim % quantizer.codebooks:
        yield (
            f"quantizer.codebooks {quantizer.codebooks} does not divide quantizer.codevector_dim "
            f"{quantizer.codevector_dim}"
        )
    if section.icsl.weight > 0 and quantizer.codebooks < 2:
        yield "icsl.weight needs at least two codebooks"
    if section.icsl.scaling == "per_frame" and not section.icsl.divided_by_accumulation:
        yield "icsl.divided_by_accumulation: false goes with icsl.scaling as_run only"
    if section.crop_seconds is not None and section.crop_seconds < section.masking.length * 0.02:
        yield f"crop_seconds {section.crop_seconds} is shorter than one masked span"
    if section.masking.probability == 0.0:
        yield "masking.probability 0 leaves nothing to predict"
    if section.masking.channel_probability > 0:
        yield "masking.channel_probability: channels are masked in fine-tuning only"
    if section.gumbel.floor > section.gumbel.start:
        yield f"gumbel.floor {section.gumbel.floor} is above gumbel.start {section.gumbel.start}"


def _finetune_arm(section: Finetune) -> Iterator[str]:
    rvq = section.rvq
    if section.train == "head" and section.transformer_from > 0:
        yield "transformer_from: with train head the transformer is never trained"
    if section.train != "head":
        if section.encoder_mode == "train":
            yield "encoder_mode: a trained encoder is in train mode anyway; leave it at eval"
        if rvq.levels and not rvq.straight_through:
            yield f"rvq.straight_through: train {section.train} gets no gradient without it"
    if section.train == "head" and section.encoder_mode == "eval":
        masked = section.masking.probability or section.masking.channel_probability
        if masked:
            yield "masking.probability: an encoder in eval mode is not masked; set it to 0"
    if rvq.commitment > 0 and section.train == "head":
        yield "rvq.commitment: with a frozen encoder nothing can follow the codes"


def _schedule(schedule: Schedule) -> Iterator[str]:
    total = schedule.warmup + schedule.hold + schedule.decay
    if schedule.kind == "tri_stage" and total > 1 + 1e-9:
        yield f"warmup + hold + decay is {total:g}, above 1"
    if schedule.kind != "tri_stage" and (schedule.hold or schedule.decay):
        yield f"hold and decay go with kind tri_stage, found {schedule.kind}"


def _masking(masking: Masking) -> Iterator[str]:
    if masking.probability > 0 and masking.length < 1:
        yield "length must be at least 1"


def _encoder(recipe: Recipe) -> Iterator[str]:
    """``finetune.encoder`` naming an arm of this recipe that doesn't exist."""
    match = re.fullmatch(r"([^/]+)/seed-(\d+|\{seed\})", recipe.finetune.encoder)
    if not match:
        return
    arm, seed = match.groups()
    if arm not in recipe.pretrain.arms:
        near = difflib.get_close_matches(arm, recipe.pretrain.arms, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"finetune.encoder: no pretraining arm {arm!r}{hint}"
    elif seed != "{seed}" and int(seed) not in recipe.seeds:
        yield f"finetune.encoder: seed {seed} is not among seeds {recipe.seeds}"
