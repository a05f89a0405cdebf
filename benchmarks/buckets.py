"""Shuffled batches beside bucketed ones: the padding's share, and the time of an epoch.

    python benchmarks/buckets.py corrected+mini --work DIR             shares and both stages timed
    python benchmarks/buckets.py corrected+mini --work DIR --pairs 0   shares only
    python benchmarks/buckets.py as-written --work DIR --set finetune.train=transformer ...

DIR is a work folder that `w2vrep prepare` made; its utterances' lengths are what counts. A share is
of the samples that the encoder sees in an epoch, by the toolkit's own plan. An epoch is timed as
the training loop does it, optimizer included, validation and checkpoints not; both ways take turns,
and a ratio is that of epochs next to each other, of seconds and of processor time. An encoder that
the study pretrains itself has to be named: `--set finetune.encoder=MODEL`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loops import copy_of_data, run_updates
from machine import describe, spread

from reproduce.data.batches import Plan
from reproduce.recipe import load_recipe
from reproduce.recipe.schema import Recipe
from reproduce.records import Stage
from reproduce.tasks.context import open_context
from reproduce.tasks.wiring import plan_of, speech_of
from reproduce.training import distributed

WAYS = ("shuffled", "bucketed")


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


def epoch(options: argparse.Namespace, stage: Stage, way: str) -> tuple[float, float]:
    """Seconds for as much audio as an epoch has, and of the processor."""
    plan, _ = plan_and_lengths(options, stage, way)
    recipe = recipe_of(options, stage, way, max(1, round(plan.updates_per_epoch)))
    arm = "no_icsl_2cb" if stage == "pretrain" else "no_rvq"
    seconds = []

    def timed(update: Callable[[], int]) -> int:
        wall, processor = time.perf_counter(), time.process_time()
        number = update()
        seconds.append((time.perf_counter() - wall, time.process_time() - processor))
        return number

    run_updates(recipe, options.copy, options.ranks, stage, arm, timed)
    walls, processor = zip(*seconds, strict=True)
    return sum(walls), sum(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    options.ranks = distributed.start("auto")
    columns = ["stage", "batch", "padding, shuffled", "bucketed"]
    for clock in ("epoch", "processor"):
        columns += [f"{clock}, shuffled, s", "bucketed, s", "ratio"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    with copy_of_data(options.work) as options.copy:
        stages: tuple[Stage, ...] = ("pretrain", "finetune")
        for stage in stages:
            section = getattr(recipe_of(options, stage, WAYS[0], 1), stage)
            shares = [f"{100 * padding(options, stage, way):.1f} %" for way in WAYS]
            times = [[epoch(options, stage, w) for w in WAYS] for _ in range(options.pairs)]
            timed = []
            for clock in (0, 1):
                before, after = ([pair[way][clock] for pair in times] for way in (0, 1))
                ratios = [a / b for a, b in zip(before, after, strict=True)]
                timed += [
                    spread(v, d) if v else "" for v, d in ((before, 1), (after, 1), (ratios, 2))
                ]
            size = f"{section.batch_size} x {section.accumulation}"
            print("|", " | ".join([stage, size, *shares, *timed]), "|", flush=True)
    print(f"\n{describe(options.ranks.device, ['torch', 'torchaudio'])}")


if __name__ == "__main__":
    main()
