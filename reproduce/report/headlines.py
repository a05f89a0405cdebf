"""What is said beside the verdicts: are the published differences noise, is the recipe too small?

Every number is computed from the published data, the recipe or the logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reproduce.records import AT_CHANCE_MARGIN, Stage
from reproduce.report.findings import Finding
from reproduce.report.measured import LOSS, STAGES, Work
from reproduce.report.published import CHANCE, PRINTED_SPLIT, Published
from reproduce.report.scale import STAGE_NAMES, Scale
from reproduce.report.statistics import CONFIDENCE, FEWEST_SEEDS

DIGITS: dict[Stage, int] = {"pretrain": 4, "finetune": 2}
LAST_POINTS = 6
"""How many of a published curve's last points show what it moves by from one to the next."""


def headlines(
    published: Published, works: Sequence[Work], scales: Sequence[Scale]
) -> list[Finding]:
    """Of the published data, then of each recipe: noise by stage, and size if that is telling."""
    found = [Finding(stage, "", "noise", published_noise(published, stage)) for stage in STAGES]
    for work, scale in zip(works, scales, strict=True):
        if scale.text:
            found.append(Finding("pretrain", work.name, "size", scale.text))
        for stage in STAGES:
            if any(work.of(stage, arm) for arm in work.arms(stage)):
                text = measured_noise(published, work, stage)
                found.append(Finding(stage, work.name, "noise", text))
    return found


def published_noise(published: Published, stage: Stage) -> str:
    """What the published data alone say of their noise: no seeds, but curves that move."""
    high, low = _ends(published, stage)
    moves = {
        arm: float(np.abs(np.diff(curve.values[-LAST_POINTS:])).max())
        for (of, split, arm), curve in published.curves.items()
        if (of, split) == (stage, PRINTED_SPLIT[stage])
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
    """The published differences against what seeds alone make in this recipe.

    Highest and lowest of a table's k values are compared, so with what the highest and the lowest
    of k runs of one arm differ by: the studentized range (Tukey).
    """
    high, low = _ends(published, stage)
    digits, split = DIGITS[stage], PRINTED_SPLIT[stage]
    question = f"Is {low:.{digits}f} against {high:.{digits}f} more than noise?"
    groups = [work.values(stage, arm, split, LOSS[stage]) for arm in work.arms(stage)]
    groups = [group for group in groups if len(group) >= FEWEST_SEEDS]
    if not groups:
        return f"{question} Not known from here: no arm has {FEWEST_SEEDS} finished seeds."
    rows, steps = len(_tabled(published, stage)), _steps(published, stage)
    noise, pooled, freedom = range_by_accident(groups, rows)
    answer = "Yes, more" if high - low > noise else "No"
    return (
        f"{question} {answer}, by the spread over seeds measured here: the highest and the lowest "
        f"of {rows} runs of one arm, as many as the table has rows, differ by up to {noise:.2g} "
        f"nats in 95 % of cases (studentized range; standard deviation {pooled:.2g}, {freedom} "
        f"degrees of freedom), the published pair by {high - low:.{digits}f}. Of the table's "
        f"{len(steps)} steps from one value to the next ({_list(steps, digits)}), above that: "
        f"{sum(step > noise for step in steps) or 'none'}."
    )


def range_by_accident(groups: Sequence[Sequence[float]], count: int) -> tuple[float, float, int]:
    """What the range of ``count`` like values stays under in 95 % of cases.

    Args:
        groups: runs of each arm, two or more an arm; their spread within arms is pooled.
        count: how many values the range is of.

    Returns:
        The range, the pooled standard deviation and its degrees of freedom.
    """
    from scipy.stats import studentized_range  # takes a second to import

    freedom = sum(len(group) - 1 for group in groups)
    pooled = math.sqrt(sum(float(np.var(group)) * len(group) for group in groups) / freedom)
    return float(studentized_range.ppf(CONFIDENCE, count, freedom)) * pooled, pooled, freedom


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
