"""finetune: the RVQ arms of the recipe over the one loop, as a bank of heads where possible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reproduce.data.vocabulary import Vocabulary
from reproduce.errors import DataError, UsageError
from reproduce.model.interop import CONFIG, PICKLED, SAFETENSORS, load_encoder
from reproduce.model.recognizer import HeadBank, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.recipe.schema import Finetune, Recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages.features import keep_features
from reproduce.stages.grid import Context, open_context, run_grid
from reproduce.stages.recognition import FinetuneTask, encoder_parameters
from reproduce.stages.wiring import adamw, compile_encoder, loop_settings, plan_of, speech_of
from reproduce.training.checkpoint import checkpoint_updates
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Learner, Loop


def finetune(
    recipe: Recipe, work: WorkFolder, ranks: Ranks, arms: Sequence[str], seeds: Sequence[int]
) -> None:
    """Every arm x seed given; arms that can share an encoder's pass train together."""
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
        for group in _resumable_together(context, arms, seed):
            train_bank(context, group, seed, records, label)

    run_grid(context, units, train)


def banks(recipe: Recipe, arms: Sequence[str]) -> list[list[str]]:
    """Arms that train together: those over a frozen encoder that differ in their levels only."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        section = recipe.finetune_arm(arm)
        alike = section.with_overrides({"rvq.levels": 0}).model_dump_json()
        groups.setdefault(alike if section.train == "head" else arm, []).append(arm)
    return list(groups.values())


def _resumable_together(context: Context, arms: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Arms by the newest checkpoint they have in common, so that none loses what it has."""
    runs = {arm: context.work.run("finetune", arm, seed) for arm in arms}
    have: dict[str, list[int]] = {}
    if context.ranks.main:
        have = {arm: checkpoint_updates(run.checkpoints) for arm, run in runs.items()}
    have = context.ranks.gather(have)[0]
    begun = [arm for arm in arms if have[arm]]
    if begun and set.intersection(*(set(have[arm]) for arm in begun)):
        groups = [begun, [arm for arm in arms if not have[arm]]]
    else:
        groups = [[arm] for arm in begun] + [[arm for arm in arms if not have[arm]]]
    yield from (group for group in groups if group)


def train_bank(
    context: Context, arms: list[str], seed: int, records: dict[str, RunRecord], label: str
) -> None:
    """The arms of a bank, from their newest common checkpoint or from the start."""
    section = context.recipe.finetune_arm(arms[0])
    train, valid = (speech_of(context, section, split) for split in ("train", "valid"))
    vocabulary = Vocabulary.make(context.recipe.data.vocabulary, train.texts)
    levels = {arm: context.recipe.finetune_arm(arm).rvq.levels for arm in arms}
    encoder = load_encoder(encoder_path(context.recipe, context.work, seed, arms[0]))
    heads = HeadBank(
        levels,
        encoder.config.width,
        len(vocabulary),
        seed=seed,
        head_dropout=section.head_dropout,
        options=_rvq_options(section),
    )
    recognizer = Recognizer(encoder, heads, input_length=section.input_length)
    recognizer.to(context.ranks.device)
    compile_encoder(context, encoder)
    if deterministic(section) and section.keep_features != "no":
        for speech in (train, valid):
            speech.features = keep_features(context, recognizer, speech, section.keep_features)
    learners = []
    for arm in arms:
        parameters = list(heads.arm_parameters(arm))
        if section.train != "head":
            parameters += encoder_parameters(recognizer, section)
        run, record = context.work.run("finetune", arm, seed), records[arm]
        optimizer = adamw(parameters, section)
        learners.append(Learner(run, record, parameters, optimizer, section.optimizer.clip_norm))
    task = FinetuneTask(recognizer, section, vocabulary, train, valid, seed, context, learners)
    plan = plan_of(section, len(train), seed)
    settings = loop_settings(section, "finetune", seed, plan, label)
    Loop(task, learners, train, plan, settings, context.ranks).run()


def deterministic(section: Finetune) -> bool:
    """Whether an utterance's features are the same in every batch of every epoch."""
    frozen = section.train == "head" and section.encoder_mode == "eval"
    return frozen and section.input_length == "utterance" and not section.rvq.padding


def _rvq_options(section: Finetune) -> RvqOptions:
    rvq = section.rvq
    return RvqOptions(
        codes=rvq.codes,
        decay=rvq.decay,
        ema=rvq.ema,
        padding=rvq.padding,
        kmeans_init=rvq.kmeans_init,
        revive_below=rvq.revive_below,
        straight_through=rvq.straight_through,
    )


def encoder_path(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> str | Path:
    """``finetune.encoder`` of an arm for a seed: a run of this work folder, or what `load_encoder`
    takes.

    Raises:
        DataError: the run isn't finished.
    """
    name = recipe.finetune_arm(arm).encoder
    match = re.fullmatch(r"([^/]+)/seed-(\d+|\{seed\})", name)
    if not match or Path(name).exists():
        return Path(name) if Path(name).exists() else name
    number = seed if match[2] == "{seed}" else int(match[2])
    run = work.run("pretrain", match[1], number)
    if not (run.model / "model.safetensors").exists():
        raise DataError(
            f"the encoder {run.name} isn't finished",
            where="finetune.encoder",
            do=f"pretrain it first: w2vrep pretrain RECIPE --work {work.root} --arm {match[1]} "
            f"--seed {number}",
        )
    return run.model


def settings_of_encoder(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> dict[str, Any]:
    """Hash of a local encoder's files, so that runs on another one aren't taken for the same."""
    path = Path(encoder_path(recipe, work, seed, arm))
    weights = [path / name for name in (SAFETENSORS, PICKLED) if (path / name).is_file()]
    if not weights:  # a name, which stands for the same weights everywhere
        return {}
    digest = hashlib.sha256()
    for file in (path / CONFIG, weights[0]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return {"encoder_sha256": digest.hexdigest()}
