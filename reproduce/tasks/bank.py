"""Arms that train together: banks of heads over one encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reproduce.data.vocabulary import Vocabulary
from reproduce.model.interop import load_encoder
from reproduce.model.recognizer import HeadBank, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.recipe.schema import Finetune, Recipe
from reproduce.records import RunRecord
from reproduce.tasks.context import Context
from reproduce.tasks.encoders import encoder_path
from reproduce.tasks.features import keep_features
from reproduce.tasks.recognition import FinetuneTask, encoder_parameters
from reproduce.tasks.wiring import adamw, compile_encoder, loop_settings, plan_of, speech_of
from reproduce.training.checkpoint import checkpoint_updates
from reproduce.training.loop import Learner, Loop


def banks(recipe: Recipe, arms: Sequence[str]) -> list[list[str]]:
    """Arms that train together: those over a frozen encoder that differ in their levels only."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        section = recipe.finetune_arm(arm)
        alike = section.with_overrides({"rvq.levels": 0}).model_dump_json()
        groups.setdefault(alike if section.train == "head" else arm, []).append(arm)
    return list(groups.values())


def resumable_together(context: Context, arms: Sequence[str], seed: int) -> Iterator[list[str]]:
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
    train.normalized = valid.normalized = encoder.config.normalized
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
    plan = plan_of(section, train.cropped, seed)
    settings = loop_settings(section, "finetune", seed, plan, label, context.recipe.compute)
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
