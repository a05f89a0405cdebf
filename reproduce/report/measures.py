"""What a part of a claim measures: one quantity of some arms, seed by seed.

A measure is a name in ``claim_tests.csv`` and a function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from reproduce.records import Stage
from reproduce.report.codes import Codes
from reproduce.report.measured import LOSS, codebooks_of
from reproduce.report.published import ClaimPart, Measure
from reproduce.report.statistics import (
    Curve,
    Interval,
    area,
    lead,
    mean_interval,
    roughness,
    slope,
    spread_interval,
    updates_to_reach,
)


class Source(Protocol):
    """What a claim is tested on: the runs of one recipe, or the published data."""

    def seeds(self, stage: Stage, arm: str) -> set[int]: ...

    def final(
        self,
        stage: Stage,
        split: str,
        arm: str,
        seed: int,
        column: str = "",
        *,
        series: bool = False,
    ) -> float | None:
        """The last value of a column of ``metrics.csv``, of the loss where none is named."""
        ...

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve | None:
        """The loss over updates."""
        ...

    def codes(self, stage: Stage, arm: str, seed: int) -> Codes: ...


def unit_of(part: ClaimPart) -> str:
    """What the numbers of a part are in."""
    if part.measure in ("roughness", "spread", "error_for_bits"):
        return "ln of a ratio"
    if part.measure == "updates_to_reach":
        return "updates"
    unit = {"code_nmi": "mutual information", "wer": "WER"}.get(part.column, "nats")
    return f"{unit} per doubling" if part.measure == "slope" else unit


def of_losses(part: ClaimPart) -> bool:
    """Whether a part's quantity is a loss in nats, so that the table's margin speaks of it."""
    losses = ("final", "final_of_two", "slope", "area")
    return part.measure in losses and part.column == LOSS[part.stage]


def shared_seeds(part: ClaimPart, source: Source) -> list[int]:
    """Seeds that all arms of a part have, in order."""
    return sorted(set.intersection(*(source.seeds(part.stage, arm) for arm in part.arms)))


def part_values(part: ClaimPart, source: Source) -> list[float]:
    """The quantity of a part for every seed that all its arms share, in order of seeds.

    Empty for a spread, which is of all seeds together.
    """
    if part.measure == "spread":
        return []
    measure = _MEASURES[part.measure]
    values = (measure(part, source, seed) for seed in shared_seeds(part, source))
    return [value for value in values if value is not None]


def part_interval(part: ClaimPart, source: Source) -> Interval:
    """The 95 % interval that a part's verdict uses."""
    if part.measure != "spread":
        return mean_interval(part_values(part, source))
    pairs = [losses for s in shared_seeds(part, source) if (losses := _finals(part, source, s))]
    return spread_interval([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def never_reached(part: ClaimPart, source: Source) -> int:
    """Seeds of which the first arm never reaches the final loss of the second."""
    if part.measure != "updates_to_reach":
        return 0
    pairs = (_curves(part, source, seed) for seed in shared_seeds(part, source))
    return sum(
        math.isinf(updates_to_reach(pair[0], float(pair[1].values[-1]))) for pair in pairs if pair
    )


def doublings(arms: Sequence[str]) -> list[float]:
    """log2 of the codebooks of pretraining arms."""
    return [math.log2(codebooks_of(arm, {}) or math.nan) for arm in arms]


def _finals(
    part: ClaimPart, source: Source, seed: int, *, series: bool = False
) -> list[float] | None:
    """Last values of all arms; None if one isn't known."""
    found = (
        source.final(part.stage, part.split, arm, seed, part.column, series=series)
        for arm in part.arms
    )
    values = [value for value in found if value is not None]
    return values if len(values) == len(part.arms) else None


def _curves(part: ClaimPart, source: Source, seed: int) -> tuple[Curve, Curve] | None:
    first, second = (source.curve(part.stage, part.split, arm, seed) for arm in part.arms)
    if first is None or second is None or min(len(first), len(second)) < 2:
        return None
    return first, second


def _final(part: ClaimPart, source: Source, seed: int) -> float | None:
    values = _finals(part, source, seed)
    return values[0] - values[1] if values else None


def _final_of_two(part: ClaimPart, source: Source, seed: int) -> float | None:
    values = _finals(part, source, seed)
    return (values[0] - values[1]) - (values[2] - values[3]) if values else None


def _slope(part: ClaimPart, source: Source, seed: int) -> float | None:
    values = _finals(part, source, seed, series=True)
    return slope(doublings(part.arms), values) if values else None


def _area(part: ClaimPart, source: Source, seed: int) -> float | None:
    if (pair := _curves(part, source, seed)) is None:
        return None
    start = max(curve.updates[0] for curve in pair)
    end = min(curve.updates[-1] for curve in pair)
    return area(pair[0], start, end) - area(pair[1], start, end) if end > start else None


def _lead(part: ClaimPart, source: Source, seed: int) -> float | None:
    pair = _curves(part, source, seed)
    return lead(*pair) if pair else None


def _roughness(part: ClaimPart, source: Source, seed: int) -> float | None:
    rough = [roughness(curve) for curve in _curves(part, source, seed) or ()]
    first, second = rough or (None, None)
    return math.log(first / second) if first and second else None


def _error_for_bits(part: ClaimPart, source: Source, seed: int) -> float | None:
    return source.codes(part.stage, part.arms[0], seed).error_for_bits()


_MEASURES: dict[Measure, Callable[[ClaimPart, Source, int], float | None]] = {
    "final": _final,
    "final_of_two": _final_of_two,
    "slope": _slope,
    "area": _area,
    "updates_to_reach": _lead,
    "roughness": _roughness,
    "error_for_bits": _error_for_bits,
}
