"""``--estimate``: time and memory of a grid, from a few updates that are timed now.

They are trained in a temporary folder, as the stage itself would: one micro-batch an update instead
of ``accumulation``, on utterances of the prepared data or, before there is any, on noise of the
longest length that the stage takes. Nothing of the work folder is touched.
"""

from __future__ import annotations

import csv
import math
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce.data.audio import SAMPLE_RATE, PackedAudio
from reproduce.data.columns import Rows
from reproduce.data.disk import size
from reproduce.data.manifest import Manifest
from reproduce.data.summary import Summary
from reproduce.errors import W2vrepError
from reproduce.position import generator
from reproduce.recipe.named_runs import pretrained_arm
from reproduce.recipe.schema import Finetune, Recipe
from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder
from reproduce.tasks.bank import banks, deterministic, train_bank
from reproduce.tasks.context import Context, set_up
from reproduce.tasks.encoders import encoder_path
from reproduce.tasks.pretraining import train_arm
from reproduce.training.distributed import Ranks

UPDATES = 4
"""Timed, the first of which warms up."""
LONGEST = 15.0
"""Seconds of noise an utterance where a stage has no limit."""


@dataclass(frozen=True)
class Measured:
    """What a few updates took.

    Attributes:
        micro_batch: s, forward, backward and step.
        validation: s, one batch.
        before: s before the first update: encoding the utterances, where features are kept.
        utterances: that were there.
        peak: bytes, the device's or the process's.
    """

    micro_batch: float
    validation: float
    before: float
    utterances: int
    peak: int


def estimate_lines(
    recipe: Recipe,
    work: WorkFolder,
    ranks: Ranks,
    stages: Sequence[str],
    arms: Sequence[str] | None,
    seeds: Sequence[int],
) -> Iterator[str]:
    """Time and memory of the training stages among ``stages``, a line each."""
    set_up(recipe, ranks)
    prepared = Manifest.read(work.data, verify=False) if work.summary.exists() else None
    with tempfile.TemporaryDirectory(prefix="w2vrep-estimate-") as folder:
        scratch = WorkFolder(Path(folder))
        for stage in ("pretrain", "finetune"):
            if stage not in stages:
                continue
            planned = list(getattr(recipe, stage).arms)
            chosen = [arm for arm in planned if arms is None or arm in arms]
            try:
                yield from _stage(recipe, work, scratch, ranks, stage, chosen, seeds, prepared)
            except W2vrepError as error:
                yield f"estimate  {stage}: not known, {str(error).splitlines()[0]}"


def _stage(
    recipe: Recipe,
    work: WorkFolder,
    scratch: WorkFolder,
    ranks: Ranks,
    stage: Stage,
    arms: Sequence[str],
    seeds: Sequence[int],
    prepared: Manifest | None,
) -> Iterator[str]:
    groups = [[arm] for arm in arms] if stage == "pretrain" else banks(recipe, arms)
    # The largest stands for all: more codebooks or levels cost little.
    group = max(groups, key=lambda group: (len(group), _largest(recipe, stage, group)))
    section = (
        recipe.pretrain_arm(group[0]) if stage == "pretrain" else recipe.finetune_arm(group[0])
    )
    if stage == "finetune":
        recipe = _with_encoder(recipe, work, scratch, ranks, seeds[0], group[0], prepared)
    measured = _measure(recipe, scratch, ranks, stage, group, seeds[0], prepared)
    valid = None if prepared is None else len(_rows(recipe, prepared, stage, group[0], "valid"))
    train = None if prepared is None else len(_rows(recipe, prepared, stage, group[0], "train"))
    update = measured.micro_batch * section.accumulation
    seconds = update * section.updates
    told = f"{_time(update)} an update"
    if valid and train:
        every = section.validation.every
        an_epoch = train / (section.batch_size * section.accumulation)
        times = math.ceil(section.updates / (an_epoch if every == "epoch" else every))
        limit = section.validation.max_utterances
        batches = math.ceil(min(valid, limit or valid) / section.validation.batch_size)
        seconds += times * batches * measured.validation
        told += f", {_time(batches * measured.validation)} a validation"
    else:
        told += " (without validation: known after w2vrep prepare)"
    total = seconds * len(groups) * len(seeds)
    kept = isinstance(section, Finetune) and section.keep_features != "no"
    if isinstance(section, Finetune) and kept and deterministic(section) and valid and train:
        encoding = measured.before * (train + valid) / measured.utterances
        total += encoding * (len(seeds) if "{seed}" in section.encoder else 1)
        told += f", {_time(encoding)} to encode the speech once"
    count = len(groups) * len(seeds)
    what = "run" if len(group) == 1 else "bank"
    of = f" of {len(group)} arms" if len(group) > 1 else ""
    runs = f"{count} {what}{'s' * (count > 1)}{of}"
    yield f"estimate  {stage}: {told}; {_time(seconds)} each, {runs} {_time(total)}"
    where = ranks.device.type.upper()
    speech = "prepared speech" if prepared is not None else "noise"
    yield (
        f"          {size(measured.peak)} of memory ({where}); {UPDATES} updates of "
        f"{'+'.join(group)} timed on {speech}, 1 of {section.accumulation} micro-batches each"
    )


def _largest(recipe: Recipe, stage: Stage, group: Sequence[str]) -> int:
    if stage == "pretrain":
        return max(recipe.pretrain_arm(arm).quantizer.codebooks for arm in group)
    return max(recipe.finetune_arm(arm).rvq.levels for arm in group)


def _with_encoder(
    recipe: Recipe,
    work: WorkFolder,
    scratch: WorkFolder,
    ranks: Ranks,
    seed: int,
    arm: str,
    prepared: Manifest | None,
) -> Recipe:
    """The recipe with an encoder that is there: one of the work folder's that isn't finished is
    stood in for by one of the same shape, trained here for a few updates."""
    stand_in = pretrained_arm(recipe, recipe.finetune_arm(arm))
    if stand_in is None:
        return recipe
    try:
        found = encoder_path(recipe, work, seed, arm)
    except W2vrepError:
        run = scratch.run("pretrain", stand_in, seed)
        if not run.model.exists():
            _measure(recipe, scratch, ranks, "pretrain", [stand_in], seed, prepared)
        found = run.model
    return _changed(recipe, "finetune", {"encoder": str(found)})


def _measure(
    recipe: Recipe,
    scratch: WorkFolder,
    ranks: Ranks,
    stage: Stage,
    arms: list[str],
    seed: int,
    prepared: Manifest | None,
) -> Measured:
    """Train a few updates in the scratch folder and read what they took off metrics.csv."""
    validation = {"every": UPDATES, "max_utterances": getattr(recipe, stage).validation.batch_size}
    small = _changed(
        recipe,
        stage,
        {"updates": UPDATES, "accumulation": 1, "log_every": 1, "checkpoint_every": 10 * UPDATES}
        | {f"validation.{key}": value for key, value in validation.items()},
    )
    manifest = _few(small, prepared, stage, arms[0], scratch)
    context = Context(small, scratch, manifest, ranks, stage)
    runs = {arm: scratch.run(stage, arm, seed) for arm in arms}
    records = {arm: RunRecord(arm, seed) for arm in arms}
    for run in runs.values():
        run.root.mkdir(parents=True, exist_ok=True)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if stage == "pretrain":
        train_arm(context, arms[0], seed, records[arms[0]], "timing")
    else:
        train_bank(context, arms, seed, records, "timing")
    return _read(runs[arms[0]], ranks, len(manifest.rows))


def _read(run: RunFolder, ranks: Ranks, utterances: int) -> Measured:
    with run.metrics.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["update"])]
    at = {(row["split"], int(row["update"])): float(row["wall_seconds"]) for row in rows}
    first, last = at["train", 1], at["train", UPDATES]
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    update = (last - first) / (UPDATES - 1)
    before = max(0.0, first - update)
    return Measured(update, at["valid", UPDATES] - last, before, utterances, peak)


def _changed(recipe: Recipe, stage: Stage, values: dict[str, Any]) -> Recipe:
    """The recipe with dotted keys of a stage replaced, in its arms too."""
    section = getattr(recipe, stage)
    arms = {
        arm: {key: value for key, value in keys.items() if key not in values}
        for arm, keys in section.arms.items()
    }
    changed = section.with_overrides({**values, "arms": {}}).model_copy(update={"arms": arms})
    return recipe.model_copy(update={stage: changed})


def _rows(recipe: Recipe, manifest: Manifest, stage: Stage, arm: str, split: str) -> Rows:
    section = recipe.pretrain_arm(arm) if stage == "pretrain" else recipe.finetune_arm(arm)
    return manifest.select(
        split=split,
        subset=getattr(section, "subset", None) or recipe.data.subset,
        min_seconds=section.min_seconds or None,
        max_seconds=section.max_seconds,
    )


def _few(
    recipe: Recipe, prepared: Manifest | None, stage: Stage, arm: str, scratch: WorkFolder
) -> Manifest:
    """Enough utterances for the timed updates, of those that the stage would use, or noise."""
    section = recipe.pretrain_arm(arm) if stage == "pretrain" else recipe.finetune_arm(arm)
    wanted = {
        "train": UPDATES * section.batch_size,
        "valid": section.validation.batch_size,
    }
    if prepared is None:
        crop = getattr(section, "crop_seconds", None)
        return _noise(wanted, section.max_seconds or crop or LONGEST, scratch)
    parts = []
    for split, count in wanted.items():
        rows = _rows(recipe, prepared, stage, arm, split)
        order = generator(0, "estimate", split).permutation(len(rows))
        parts.append(rows.take(np.sort(order[:count])))
    return Manifest(parts[0].with_rows(parts[1]), prepared.audio, prepared.summary)


def _noise(wanted: dict[str, int], seconds: float, scratch: WorkFolder) -> Manifest:
    """Noise of so many seconds, all utterances the same."""
    scratch.data.mkdir(parents=True, exist_ok=True)
    samples = round(seconds * SAMPLE_RATE)
    noise = generator(0, "noise").normal(0, 3000, samples).astype("<i2")
    path = scratch.data / "audio.pcm"
    noise.tofile(path)
    splits = [split for split, count in wanted.items() for _ in range(count)]
    count = len(splits)
    rows = Rows.of(
        {
            "id": [f"{split}{n}" for n, split in enumerate(splits)],
            "split": splits,
            "subset": ["10min"] * count,
            "seconds": [seconds] * count,
            "samples": [samples] * count,
            "offset": [0] * count,
            "text": ["THE QUICK BROWN FOX"] * count,
        }
    )
    nothing: dict[str, Any] = {}
    summary = Summary(
        "noise", nothing, 0, "", "", samples, nothing, nothing, nothing, nothing, nothing, nothing
    )
    return Manifest(rows, PackedAudio(path), summary)


def _time(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86400:.0f} days"
