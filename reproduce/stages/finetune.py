"""finetune: the RVQ arms of the recipe over the one loop, as a bank of heads where possible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reproduce.data.vocabulary import Vocabulary
from reproduce.errors import DataError, DivergedError, UsageError, W2vrepError
from reproduce.model.interop import (
    CONFIG,
    PICKLED,
    SAFETENSORS,
    HubName,
    encoder_source,
    load_encoder,
)
from reproduce.model.recognizer import HeadBank, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.recipe.schema import Finetune, Recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages.features import keep_features
from reproduce.stages.grid import Context, open_context, read_record, run_grid
from reproduce.stages.recognition import FinetuneTask, encoder_parameters
from reproduce.stages.wiring import adamw, compile_encoder, loop_settings, plan_of, speech_of
from reproduce.training.checkpoint import checkpoint_updates
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Learner, Loop


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
    encoder = load_encoder(str(encoder_path(context.recipe, context.work, seed, arms[0])))
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
    encoding_seconds = 0.0
    if deterministic(section) and section.keep_features != "no":
        for speech in (train, valid):
            kept, seconds = keep_features(context, recognizer, speech, section.keep_features)
            speech.features = kept
            encoding_seconds += seconds
    learners = []
    for arm in arms:
        parameters = list(heads.arm_parameters(arm))
        if section.train != "head":
            parameters += encoder_parameters(recognizer, section)
        run, record = context.work.run("finetune", arm, seed), records[arm]
        record.bank = arms if len(arms) > 1 else []
        optimizer = adamw(parameters, section)
        learner = Learner(run, record, parameters, optimizer, section.optimizer.clip_norm)
        learner.earlier_seconds = encoding_seconds
        learners.append(learner)
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


def check_encoders(recipe: Recipe, ranks: Ranks) -> None:
    """Load every encoder that doesn't come from this work folder, before days are spent on others.

    Hub names and bundles are fetched on the way.

    Raises:
        DataError: one that can't be had.
    """
    names = {_encoder_name(recipe, s, a) for a in recipe.finetune.arms for s in recipe.seeds}
    problem: W2vrepError | None = None
    if ranks.main:
        try:
            for name in sorted(names):
                if _pretraining_run(name) is None:
                    load_encoder(name)
        except W2vrepError as error:
            problem = error
    problem = ranks.gather(problem)[0]
    if problem is not None:
        raise problem


def _encoder_name(recipe: Recipe, seed: int, arm: str) -> str:
    return recipe.finetune_arm(arm).encoder.replace("{seed}", str(seed))


def _pretraining_run(name: str) -> tuple[str, int] | None:
    """Arm and seed of a name that means a run of the work folder."""
    match = re.fullmatch(r"([^/]+)/seed-(\d+)", name)
    return (match[1], int(match[2])) if match and not Path(name).exists() else None


def encoder_path(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> Path | HubName | str:
    """``finetune.encoder`` of an arm for a seed: the folder of a finished run of this work folder,
    another folder, a hub name or the name of a bundle.

    Raises:
        DataError: the run isn't finished, or there is no such thing.
        DivergedError: the run diverged.
    """
    name = _encoder_name(recipe, seed, arm)
    run_of = _pretraining_run(name)
    if run_of is None:
        return encoder_source(name)
    run = work.run("pretrain", *run_of)
    record = read_record(run)
    if record is not None and record.outcome == "diverged":
        raise DivergedError(f"its encoder {run.name} diverged", where="finetune.encoder")
    if not (run.model / SAFETENSORS).exists():
        raise DataError(
            f"the encoder {run.name} isn't finished",
            where="finetune.encoder",
            do=f"pretrain it first: w2vrep pretrain RECIPE --work {work.root} --arm {run.arm} "
            f"--seed {run.seed}",
        )
    return run.model


def settings_of_encoder(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> dict[str, Any]:
    """What tells an encoder from another one of the same name: a hash of its files, or a commit.

    A bundle's name stands for the same weights everywhere.
    """
    source = encoder_path(recipe, work, seed, arm)
    if isinstance(source, HubName):
        return {"encoder_commit": source.commit}
    if not isinstance(source, Path):
        return {}
    weights = [source / name for name in (SAFETENSORS, PICKLED) if (source / name).is_file()]
    digest = hashlib.sha256()
    for file in (source / CONFIG, *weights[:1]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return {"encoder_sha256": digest.hexdigest()}
