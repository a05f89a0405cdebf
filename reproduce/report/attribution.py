"""Why the published pair of 8 codebooks differs: ICSL and clipping crossed, and loss over chance.

The study's two arms with 8 codebooks differ in ICSL and in clipping. Where a recipe has runs of all
four combinations, the effect of each is the mean difference it makes, with and without the other.
Beside it: a model that hasn't learned yet has a loss over chance, since its predictions and targets
aren't alike in length and direction to all candidates; how much that is, and how it goes, by number
of codebooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reproduce.report.measured import LOSS, Run, Work, flatten
from reproduce.report.published import Published
from reproduce.report.statistics import Curve, Interval, mean_interval

Cell = tuple[bool, bool]
"""With ICSL, with clipping."""
CELLS: tuple[Cell, ...] = ((False, False), (True, False), (False, True), (True, True))
FACTORS = ("pretrain.icsl.weight", "pretrain.optimizer.clip_norm")
"""What the four arms may differ in; and how ICSL is divided, which without weight says nothing."""
_BESIDE = ("pretrain.icsl.divided_by_accumulation",)


@dataclass(frozen=True)
class Factorial:
    """Four arms that cross ICSL and clipping, all else alike.

    Attributes:
        codebooks: of all four.
        arms: by cell.
        seeds: those that all four have finished, in order.
        losses: final validation loss by cell, one a seed.
    """

    codebooks: int
    arms: Mapping[Cell, str]
    seeds: tuple[int, ...]
    losses: Mapping[Cell, tuple[float, ...]]

    @property
    def effects(self) -> dict[str, tuple[float, ...]]:
        """What each factor adds to the loss, seed by seed, in nats; below 0: it helps.

        The effect of a factor is the mean of its two differences; the interaction is half of what
        the difference by ICSL grows by under clipping, so that ICSL alone adds ICSL less
        interaction, and both together ICSL plus clipping.
        """
        none, icsl, clip, both = (np.array(self.losses[cell]) for cell in CELLS)
        found = {
            "ICSL": ((icsl - none) + (both - clip)) / 2,
            "clipping": ((clip - none) + (both - icsl)) / 2,
            "interaction": ((both - clip) - (icsl - none)) / 2,
            "both, as published": both - none,
        }
        return {name: tuple(map(float, values)) for name, values in found.items()}

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % Student t interval of the mean of each effect."""
        return {name: mean_interval(values) for name, values in self.effects.items()}


def factorials(work: Work) -> list[Factorial]:
    """Every complete crossing of ICSL and clipping among the finished runs, by codebooks.

    Arms belong together by what their runs were trained with, not by name.
    """
    groups: dict[str, dict[Cell, str]] = {}
    sizes: dict[str, int] = {}
    for arm in work.arms("pretrain"):
        runs = work.counted("pretrain", arm)
        settings = _settings(runs[0]) if runs else None
        if settings is None:
            continue
        weight, clip = (settings.pop(key, None) for key in FACTORS)
        for key in _BESIDE:
            settings.pop(key, None)
        alike = json.dumps(settings, sort_keys=True, default=str)
        cell = bool(weight), clip is not None
        if cell not in groups.setdefault(alike, {}):
            groups[alike][cell] = arm
        sizes[alike] = settings["pretrain.quantizer.codebooks"]
    found = []
    for alike, arms in groups.items():
        if len(arms) == len(CELLS):
            seeds = sorted(
                set.intersection(*(work.seeds("pretrain", arm) for arm in arms.values()))
            )
            losses = {cell: _losses(work, arm, seeds) for cell, arm in arms.items()}
            if seeds:
                found.append(Factorial(sizes[alike], arms, tuple(seeds), losses))
    return sorted(found, key=lambda factorial: factorial.codebooks)


def excess_curves(work: Work) -> dict[int, list[Curve]]:
    """Validation loss less chance over updates, of runs without ICSL, by number of codebooks.

    Only of runs that were validated before their first update.
    """
    found: dict[int, list[Curve]] = {}
    for arm in work.arms("pretrain"):
        for run in work.counted("pretrain", arm):
            settings = _settings(run)
            if settings is None or settings.get(FACTORS[0]):
                continue
            loss, chance = (run.curve("valid", name) for name in (LOSS["pretrain"], "chance_loss"))
            if len(loss) and loss.updates[0] == 0 and np.array_equal(loss.updates, chance.updates):
                curve = Curve(loss.updates, loss.values - chance.values, loss.name)
                found.setdefault(settings["pretrain.quantizer.codebooks"], []).append(curve)
    return dict(sorted(found.items()))


def published_difference(factorial: Factorial, published: Published) -> float | None:
    """The published losses of the arms with both less that with neither, in nats, if there are."""
    both, none = (
        published.numbers.get(("pretrain", factorial.arms[cell])) for cell in (CELLS[3], CELLS[0])
    )
    return both.value - none.value if both and none else None


def paragraph(published: Published, work: Work) -> str:
    """What of the published difference ICSL made, in words; empty without a complete crossing."""
    texts = []
    for factorial in factorials(work):
        difference = published_difference(factorial, published)
        effects = "; ".join(
            f"{name} {_interval(interval)}" for name, interval in factorial.intervals.items()
        )
        count = len(factorial.seeds)
        texts.append(
            f"With {factorial.codebooks} codebooks ICSL and clipping were crossed, "
            f"{count} seed{'s' * (count != 1)}. They add to the final validation loss, in nats: "
            + effects
            + (f" (published: {difference:+.4f})." if difference is not None else ".")
        )
    if not texts:
        return ""
    return " ".join([*texts, *_of_excess(work)])


def _of_excess(work: Work) -> Iterator[str]:
    curves = excess_curves(work)
    if not curves:
        return
    first = [f"{np.mean([c.values[0] for c in of]):+.3f} ({size})" for size, of in curves.items()]
    text = (
        f"Before the first update the loss lies over chance by {', '.join(first)} nats (codebooks "
        "in brackets), since untrained targets differ; "
    )
    gone = [_gone(of) for of in curves.values()]
    left = [update for update in gone if update is not None]
    if len(left) < len(gone):
        yield text + "it doesn't get down to chance with all of them."
    else:
        yield text + f"all have got down to chance by update {max(left):.0f}."


def _gone(curves: list[Curve]) -> float | None:
    """The first update at which the mean of the curves isn't above 0."""
    updates = curves[0].updates
    mean = np.mean([np.interp(updates, curve.updates, curve.values) for curve in curves], 0)
    under = np.flatnonzero(mean <= 0)
    return float(updates[under[0]]) if len(under) else None


def _interval(interval: Interval) -> str:
    if not interval.enough:
        return f"{interval.mean:+.4f}"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _losses(work: Work, arm: str, seeds: list[int]) -> tuple[float, ...]:
    found = (work.final("pretrain", "valid", arm, seed) for seed in seeds)
    return tuple(value for value in found if value is not None)


def _settings(run: Run) -> dict[str, Any] | None:
    """What a run was trained with, flat; None where its record doesn't say."""
    settings = dict(flatten(run.record.settings)) if run.record else {}
    return settings if "pretrain.quantizer.codebooks" in settings else None
