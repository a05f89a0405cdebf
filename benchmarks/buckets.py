"""Shuffled batches beside bucketed ones: the padding's share, and the time of an epoch.

    python benchmarks/buckets.py corrected+mini --work DIR             shares and both stages timed
    python benchmarks/buckets.py corrected+mini --work DIR --pairs 0   shares only
    python benchmarks/buckets.py as-written --work DIR --set finetune.train=transformer ...

DIR is a work folder that `w2vrep prepare` made; its utterances' lengths are what counts. A share is
of the samples that the encoder sees in an epoch, by the toolkit's own plan. An epoch is timed as
the training loop does it, optimizer included, validation and checkpoints not; both ways take turns,
and a ratio is that of epochs next to each other.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, spread

import reproduce.tasks.bank
import reproduce.tasks.pretraining
from reproduce.data.batches import Plan
from reproduce.recipe import load_recipe
from reproduce.recipe.schema import Recipe
from reproduce.records import RunRecord, Stage, WorkFolder
from reproduce.tasks.bank import train_bank
from reproduce.tasks.context import open_context
from reproduce.tasks.pretraining import train_arm
from reproduce.tasks.wiring import plan_of, speech_of
from reproduce.training import distributed
from reproduce.training.loop import Loop

WAYS = ("shuffled", "bucketed")
seconds: list[float] = []


class TimedLoop(Loop):
    """The loop, which notes what its updates took and validates nothing."""

    def _update(self, *given: Any) -> int:
        started = time.perf_counter()
        number = super()._update(*given)
        seconds.append(time.perf_counter() - started)
        return number

    def _validate(self, update: int) -> None:
        pass

    def _checkpoint(self, update: int) -> None:
        pass

    def _finish(self, learner: Any) -> None:
        pass


def recipe_of(options: argparse.Namespace, stage: Stage, way: str, updates: int) -> Recipe:
    sets = [f"{stage}.batches={way}", f"{stage}.updates={updates}", *options.set]
    return load_recipe(options.recipe, sets)


def plan_and_lengths(options: argparse.Namespace, stage: Stage, way: str) -> tuple[Plan, Any]:
    recipe = recipe_of(options, stage, way, 1)
    context = open_context(recipe, options.copy, options.ranks, stage)
    section = getattr(recipe, stage)
    lengths = speech_of(context, section, "train").cropped
    return plan_of(section, lengths, seed=1), lengths


def padding(options: argparse.Namespace, stage: Stage, way: str) -> float:
    """Of the samples that the encoder sees in three epochs."""
    plan, lengths = plan_and_lengths(options, stage, way)
    updates = round(3 * plan.updates_per_epoch)
    batches = [batch for update in range(1, updates + 1) for batch in plan.update(update)]
    seen = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / seen


def epoch(options: argparse.Namespace, stage: Stage, way: str) -> float:
    """Seconds for as much audio as an epoch has."""
    plan, _ = plan_and_lengths(options, stage, way)
    recipe = recipe_of(options, stage, way, max(1, round(plan.updates_per_epoch)))
    context = open_context(recipe, options.copy, options.ranks, stage)
    arm = "no_icsl_2cb" if stage == "pretrain" else "no_rvq"
    shutil.rmtree(options.copy.run(stage, arm, 1).root, ignore_errors=True)
    options.copy.run(stage, arm, 1).root.mkdir(parents=True)
    seconds.clear()
    record = RunRecord(arm, 1)
    if stage == "pretrain":
        train_arm(context, arm, 1, record, "")
    else:
        train_bank(context, [arm], 1, {arm: record}, "")
    return sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    options.ranks = distributed.start("auto")
    reproduce.tasks.pretraining.Loop = TimedLoop  # type: ignore[misc]
    reproduce.tasks.bank.Loop = TimedLoop  # type: ignore[misc]
    print("| stage | batch | padding, shuffled | bucketed | epoch, s | bucketed, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        options.copy = WorkFolder(Path(folder))
        shutil.copytree(options.work / "data", options.copy.data)
        stages: tuple[Stage, ...] = ("pretrain", "finetune")
        for stage in stages:
            section = getattr(recipe_of(options, stage, WAYS[0], 1), stage)
            shares = [f"{100 * padding(options, stage, way):.1f} %" for way in WAYS]
            times = [[epoch(options, stage, w) for w in WAYS] for _ in range(options.pairs)]
            timed = ["", "", ""]
            if times:
                before, after = zip(*times, strict=True)
                ratios = [a / b for a, b in times]
                timed = [spread(before, 1), spread(after, 1), spread(ratios)]
            size = f"{section.batch_size} x {section.accumulation}"
            print("|", " | ".join([stage, size, *shares, *timed]), "|", flush=True)
    print(f"\n{describe(options.ranks.device, ['torch', 'torchaudio'])}")


if __name__ == "__main__":
    main()
