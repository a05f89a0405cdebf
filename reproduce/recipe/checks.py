"""Combinations of keys that can't work, found before anything runs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator

from pydantic import ValidationError

from reproduce.recipe.messages import nearest
from reproduce.recipe.named_runs import named_run, pretrained_arm
from reproduce.recipe.schema import Finetune, Pretrain, Recipe, SectionT, Stage


def combination_problems(recipe: Recipe) -> list[str]:
    """Every impossible combination, a line each, beginning with its dotted path."""
    problems = [*_top(recipe), *_data(recipe), *_model(recipe)]
    problems += _grid(
        "pretrain", recipe.pretrain.arms, recipe.pretrain_arm, lambda it: _pretrain(it, recipe)
    )
    problems += _grid(
        "finetune", recipe.finetune.arms, recipe.finetune_arm, lambda it: _finetune(it, recipe)
    )
    return problems


def _grid(
    stage: str,
    arms: Iterable[str],
    section_of: Callable[[str], SectionT],
    problems_of: Callable[[SectionT], Iterator[str]],
) -> Iterator[str]:
    """The problems of a stage's arms: once where all arms have it, else an arm each."""
    sections = {}
    for arm in arms:
        with contextlib.suppress(ValidationError):  # its keys are reported one by one
            sections[arm] = section_of(arm)
    found: dict[str, list[str]] = {}
    for arm, section in sections.items():
        for text in problems_of(section):
            found.setdefault(text, []).append(arm)
    for text, having in found.items():
        if len(having) == len(sections):
            yield f"{stage}.{text}"
        else:
            yield from (f"{stage}.arms.{arm}.{text}" for arm in having)


def _top(recipe: Recipe) -> Iterator[str]:
    name = recipe.name
    if name != name.strip() or name in ("", ".", "..") or any(c in name for c in "/\\\0\n"):
        yield f"name: names the work folder; {name!r} can't"
    if len(set(recipe.seeds)) < len(recipe.seeds):
        yield f"seeds: the same seed twice in {recipe.seeds}"
    if recipe.compute.processes % recipe.cluster.nodes:
        yield (
            f"cluster.nodes: {recipe.compute.processes} processes (compute.processes) can't be "
            f"spread evenly over {recipe.cluster.nodes} machines"
        )


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.transcripts is not None and data.corpus != "folder":
        yield f"data.transcripts: only for corpus folder, found corpus {data.corpus}"
    if data.corpus == "folder" and data.transcripts is None:
        yield "data.transcripts: corpus folder needs a CSV, TSV or JSONL of transcripts"
    if data.root is not None and data.corpus == "synthetic":
        yield "data.root: corpus synthetic reads no folder; set data.corpus too"
    for parts in ("train_parts", "valid_parts"):
        if data.corpus in ("librispeech", "parquet") and not getattr(data, parts):
            yield f"data.{parts}: at least one part is needed"
    if data.download and data.corpus != "librispeech":
        yield f"data.download: only for corpus librispeech, found corpus {data.corpus}"
    if not data.download_url.startswith(("https://", "http://")):
        yield f"data.download_url: http:// or https:// expected, found {data.download_url!r}"
    for part, sha256 in data.archives_sha256.items():
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            yield f"data.archives_sha256.{part}: 64 hexadecimal digits expected, found {sha256!r}"
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
    elif sizes == {0}:
        yield "model.conv_channels: at least one convolution is needed"


def _stage(section: Stage) -> Iterator[str]:
    schedule = section.schedule
    total = schedule.warmup + schedule.hold + schedule.decay
    if schedule.kind == "tri_stage" and total > 1 + 1e-9:
        yield f"schedule.warmup: warmup + hold + decay is {total:g}, above 1"
    if schedule.decay_form == "exponential" and schedule.final_scale == 0:
        yield "schedule.final_scale: an exponential decay never reaches 0"
    for name in ("hold", "decay"):
        if schedule.kind != "tri_stage" and getattr(schedule, name):
            yield f"schedule.{name}: goes with kind tri_stage, found {schedule.kind}"
    if section.batch_seconds is not None and section.batches != "bucketed":
        yield f"batch_seconds: goes with batches bucketed, found {section.batches}"
    if section.max_seconds is not None and section.max_seconds <= section.min_seconds:
        yield f"max_seconds: {section.max_seconds} is not above min_seconds {section.min_seconds}"


def _pretrain(section: Pretrain, recipe: Recipe) -> Iterator[str]:
    yield from _stage(section)
    quantizer = section.quantizer
    if quantizer.codevector_dim % quantizer.codebooks:
        yield (
            f"quantizer.codebooks: {quantizer.codebooks} does not divide "
            f"quantizer.codevector_dim {quantizer.codevector_dim}"
        )
    if section.icsl.weight > 0 and quantizer.codebooks < 2:
        yield "icsl.weight: needs at least two codebooks"
    if section.icsl.scaling == "per_frame" and not section.icsl.divided_by_accumulation:
        yield "icsl.divided_by_accumulation: false goes with icsl.scaling as_run only"
    span = section.masking.length * math.prod(recipe.model.conv_strides) / 16000
    if section.crop_seconds is not None and section.crop_seconds < span:
        yield f"crop_seconds: {section.crop_seconds} is shorter than one masked span, {span:g}"
    if section.masking.probability == 0.0:
        yield "masking.probability: 0 leaves nothing to predict"
    if section.gumbel.floor > section.gumbel.start:
        yield f"gumbel.floor: {section.gumbel.floor} is above gumbel.start {section.gumbel.start}"


def _finetune(section: Finetune, recipe: Recipe) -> Iterator[str]:
    yield from _stage(section)
    yield from _encoder(section, recipe)
    rvq = section.rvq
    if section.train == "head" and section.transformer_from > 0:
        yield "transformer_from: with train head the transformer is never trained"
    if section.train != "head":
        if section.encoder_mode == "train":
            yield "encoder_mode: a trained encoder is in train mode anyway; leave it at eval"
        if rvq.levels and not rvq.straight_through:
            yield f"rvq.straight_through: train {section.train} gets no gradient without it"
    if section.train == "head" and section.encoder_mode == "eval":
        for name in ("probability", "channel_probability"):
            if getattr(section.masking, name):
                yield f"masking.{name}: an encoder in eval mode is not masked; set it to 0"
    if section.input_length == "padded" and rvq.levels and not rvq.padding:
        yield "rvq.padding: false needs input_length utterance; padded hides what is padding"
    if rvq.commitment > 0 and section.train == "head":
        yield "rvq.commitment: with a frozen encoder nothing can follow the codes"


def _encoder(section: Finetune, recipe: Recipe) -> Iterator[str]:
    """``encoder`` naming a run of this recipe that doesn't exist, or can't be trained before."""
    run = named_run(section.encoder)
    if run is None:
        return
    arms, kind = (
        (recipe.pretrain.arms, "pretraining")
        if run.stage == "pretrain"
        else (recipe.finetune.arms, "fine-tuning")
    )
    if run.arm not in arms:
        yield f"encoder: no {kind} arm {run.arm!r}{nearest(run.arm, arms)}"
    if run.seed != "{seed}" and run.seed not in map(str, recipe.seeds):
        yield f"encoder: seed {run.seed} is not among seeds {recipe.seeds}"
    try:
        pretrained_arm(recipe, section)
    except ValidationError:
        pass  # an arm's keys are reported one by one
    except ValueError as circle:
        yield f"encoder: a circle, {circle}; one of them needs an encoder from elsewhere"
