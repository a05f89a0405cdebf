"""What is said beside the verdicts: are the published differences noise, is the recipe too small?

Every number is computed from the published data, the recipe or the logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reproduce.records import AT_CHANCE_MARGIN, Stage
from reproduce.report.findings import Finding
from reproduce.report.measured import LOSS, STAGES, Work, flatten
from reproduce.report.published import CHANCE, Published
from reproduce.report.statistics import FEWEST_SEEDS, t_quantile

STAGE_NAMES: dict[Stage, str] = {"pretrain": "pretraining", "finetune": "fine-tuning"}
DIGITS: dict[Stage, int] = {"pretrain": 4, "finetune": 2}
FAR_TOO_SMALL = 0.25
"""Runs of fewer than this share of the study's updates say nothing about its claims."""
LAST_POINTS = 6
"""How many of a published curve's last points show what it moves by from one to the next."""


def headlines(
    published: Published, works: Sequence[Work], as_run: Mapping[str, Any]
) -> list[Finding]:
    """Of the published data, then of each recipe: noise by stage, and size if that is telling."""
    found = [Finding(stage, "", "noise", published_noise(published, stage)) for stage in STAGES]
    for work in works:
        if text := size(published, work, as_run):
            found.append(Finding("pretrain", work.name, "size", text))
        for stage in STAGES:
            if work.arms(stage):
                text = measured_noise(published, work, stage)
                found.append(Finding(stage, work.name, "noise", text))
    return found


def published_noise(published: Published, stage: Stage) -> str:
    """What the published data alone say of their noise: no seeds, but curves that move."""
    high, low = _ends(published, stage)
    moves = {
        arm: float(np.abs(np.diff(curve.values[-LAST_POINTS:])).max())
        for (of, split, arm), curve in published.curves.items()
        if (of, split) == (stage, "valid" if stage == "pretrain" else "train")
    }
    digits, steps = DIGITS[stage], _steps(published, stage)
    restless = max(moves.values())
    text = (
        f"The published {STAGE_NAMES[stage]} losses are of one seed each, so how far seeds alone "
        f"would move them isn't known. Over their last {LAST_POINTS} points curves move by up to "
        f"{restless:.{digits}f} nats from one to the next; {sum(s <= restless for s in steps)} of "
        f"the table's {len(steps)} steps from one value to the next ({_list(steps, digits)}) are "
        "no larger"
    )
    if stage == "finetune":
        return text + "."
    apart = max(
        abs(published.numbers[stage, arm].value - number.value)
        for arm, number in published.by_codebooks.items()
    )
    return text + (
        f", and table and figure 4 differ by up to {apart:.4f} over the same run. {low:.4f} and "
        f"{high:.4f} are {CHANCE - low:.4f} under and {high - CHANCE:.4f} over chance, "
        f"{CHANCE:.4f}; within {AT_CHANCE_MARGIN} this report calls a run at chance."
    )


def measured_noise(published: Published, work: Work, stage: Stage) -> str:
    """The published differences against what two runs of one arm differ by in this recipe."""
    high, low = _ends(published, stage)
    digits, split = DIGITS[stage], "valid" if stage == "pretrain" else "train"
    question = f"Is {low:.{digits}f} against {high:.{digits}f} more than noise?"
    groups = [work.values(stage, arm, split, LOSS[stage]) for arm in work.arms(stage)]
    groups = [group for group in groups if len(group) >= FEWEST_SEEDS]
    if not groups:
        return f"{question} Not known from here: no arm has {FEWEST_SEEDS} finished seeds."
    freedom = sum(len(group) - 1 for group in groups)
    pooled = math.sqrt(sum(float(np.var(group)) * len(group) for group in groups) / freedom)
    noise = t_quantile(freedom + 1) * pooled * math.sqrt(2)
    steps = _steps(published, stage)
    answer = "Yes, more" if high - low > noise else "No"
    return (
        f"{question} {answer}, by the spread over seeds measured here: two runs of one arm "
        f"differ by up to {noise:.2g} nats in 95 % of cases (standard deviation {pooled:.2g}, "
        f"{freedom} degrees of freedom), the published pair by {high - low:.{digits}f}. Of the "
        f"table's {len(steps)} steps from one value to the next ({_list(steps, digits)}), "
        f"{sum(step > noise for step in steps) or 'none'} exceed that."
    )


def size(published: Published, work: Work, as_run: Mapping[str, Any]) -> str:
    """How many updates a recipe's runs made of those in the study's logs, and its model's size."""
    parts, share = [], 1.0
    for stage in STAGES:
        logged = max(c.updates[-1] for (of, _, _), c in published.curves.items() if of == stage)
        reached = [
            updates[-1]
            for (of, _, _), run in work.runs.items()
            if of == stage and run.counted and len(updates := run.column("train", "update"))
        ]
        if not reached:
            continue
        share = min(share, max(reached) / logged)
        parts.append(
            f"{STAGE_NAMES[stage]} made {max(reached):.0f} updates where the study's logs reach "
            f"{logged:.0f} ({100 * max(reached) / logged:.2g} %)"
        )
    if not parts or share >= FAR_TOO_SMALL:
        return ""
    theirs, ours = dict(flatten(as_run)), dict(flatten(work.recipe))
    parts += [
        f"the model's {name} {ours[key]}, not {theirs[key]}"
        for key, name in (("model.width", "width is"), ("model.layers", "number of layers is"))
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]
    text = "; ".join(parts)
    return (
        f"Far too small to test the study: {text}. Its verdicts show that the chain runs, no more."
    )


def _ends(published: Published, stage: Stage) -> tuple[float, float]:
    """Highest and lowest tabled loss."""
    values = _tabled(published, stage)
    return values[-1], values[0]


def _steps(published: Published, stage: Stage) -> list[float]:
    """Differences between neighbours of the table, by value, to the digits it prints."""
    return [round(float(step), 6) for step in np.diff(_tabled(published, stage))]


def _tabled(published: Published, stage: Stage) -> list[float]:
    return sorted(n.value for (of, _), n in published.numbers.items() if of == stage and n.tabled)


def _list(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
