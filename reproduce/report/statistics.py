"""Intervals, verdicts on single numbers, and measures of a curve.

Student t throughout: at three to ten seeds the bootstrap's intervals are far too narrow.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""Under this many seeds points are shown and no verdict is given."""
MOST_SEEDS = 1000
"""Decisions that would need more seeds than this are called out of reach."""

NumberVerdict = Literal[
    "reproduced", "differs", "inconclusive", "too few seeds", "not measured", ""
]


@dataclass(frozen=True)
class Curve:
    """A loss over updates: ``updates`` [N] rising, ``values`` [N] finite, in nats.

    ``name``: whose it is among those of its arm, such as "seed 1".
    """

    updates: Floats
    values: Floats
    name: str = ""

    def __len__(self) -> int:
        return len(self.updates)


@dataclass(frozen=True)
class Interval:
    """Mean, spread and interval of ``count`` values; NaN where a value doesn't exist.

    ``low`` and ``high`` are NaN under two values, ``deviation`` (sample standard deviation) too.
    """

    count: int
    mean: float
    deviation: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def widened(self, confidence: float) -> Interval:
        """The interval at another confidence than 95 %."""
        half = self.half_width * t_quantile(self.count, confidence) / t_quantile(self.count)
        return replace(self, low=self.mean - half, high=self.mean + half)

    def seeds_to_decide(self, distance: float, confidence: float) -> int | None:
        """Seeds until a mean this far from its threshold stands clear of it at this spread."""
        return seeds_to_decide(distance, self.deviation, confidence)

    @property
    def enough(self) -> bool:
        """Whether there are seeds enough for a verdict."""
        return self.count >= FEWEST_SEEDS


@dataclass(frozen=True)
class RatioInterval(Interval):
    """ln of a ratio of two standard deviations over the same seeds; see `spread_interval`."""

    correlation: float = 0.0

    def widened(self, confidence: float) -> Interval:
        half = _ratio_half_width(self.count, self.correlation, confidence)
        return replace(self, low=self.mean - half, high=self.mean + half)

    def seeds_to_decide(self, distance: float, confidence: float) -> int | None:
        return _fewest(lambda n: _ratio_half_width(n, self.correlation, confidence), abs(distance))


@cache
def t_quantile(count: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided Student t quantile for ``count`` values (``count`` - 1 degrees of freedom)."""
    return float(stdtrit(count - 1, 0.5 + confidence / 2))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Where the mean of more such values lies: mean ± t s / sqrt(n)."""
    return _interval(values, confidence, one_more=0)


def prediction_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Where one more run lies: mean ± t s sqrt(1 + 1/n)."""
    return _interval(values, confidence, one_more=1)


def spread_interval(
    values: Sequence[float], others: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """ln of the ratio of two standard deviations, of values that come in pairs.

    Pitman (1939) and Morgan (1939): two normal variables of which one is scaled have the same
    variance if their sum and difference aren't correlated. Inverting that t test with n - 2 degrees
    of freedom gives 1/2 ln w ± 1/2 arcosh(1 + 2 (1 - r²) t² / (n - 2)), exactly, for the ratio w
    of the sample variances and the correlation r of the pairs. (An F test would take the pairs for
    independent.)

    Args:
        values: [N], one a seed.
        others: [N], of the same seeds.
    """
    x, y = (np.asarray(side, dtype=np.float64) for side in (values, others))
    n = len(x)
    if n < FEWEST_SEEDS or min(np.ptp(x), np.ptp(y)) <= 0:
        return Interval(n, math.nan, math.nan, math.nan, math.nan)
    mean = math.log(float(x.std(ddof=1) / y.std(ddof=1)))
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))
    half = _ratio_half_width(n, r, confidence)
    return RatioInterval(n, mean, math.nan, mean - half, mean + half, correlation=r)


def _ratio_half_width(count: int, correlation: float, confidence: float) -> float:
    t = t_quantile(count - 1, confidence)  # count - 2 degrees of freedom
    return math.acosh(1 + 2 * (1 - correlation**2) * t**2 / (count - 2)) / 2


def _interval(values: Sequence[float], confidence: float, *, one_more: int) -> Interval:
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(data.mean())
    if n == 1:
        return Interval(1, mean, math.nan, math.nan, math.nan)
    deviation = float(data.std(ddof=1))
    half = t_quantile(n, confidence) * deviation * math.sqrt(one_more + 1 / n)
    return Interval(n, mean, deviation, mean - half, mean + half)


def number_verdict(
    published: float | None, plus_minus: float, predicted: Interval, margin: float
) -> NumberVerdict:
    """Whether one more run could have given the published number.

    Args:
        published: the published value; None: there is none, and the verdict is empty.
        plus_minus: how exactly it is known (half a unit of its last printed digit, or the error of
            reading a figure); it counts as inside if any value it may stand for is.
        predicted: prediction interval of the measured runs.
        margin: the largest half-width at which "inside" says something.
    """
    if predicted.count == 0:
        return "not measured"
    if published is None:
        return ""
    if not predicted.enough:
        return "too few seeds"
    if not predicted.low - plus_minus <= published <= predicted.high + plus_minus:
        return "differs"
    return "reproduced" if predicted.half_width <= margin else "inconclusive"


def table_margin(published: Sequence[float]) -> float:
    """Half the smallest difference between neighbouring rows of a published table, by value."""
    return float(np.diff(np.unique(np.asarray(published, dtype=np.float64))).min()) / 2


def seeds_to_predict(deviation: float, margin: float) -> int | None:
    """Seeds until a prediction interval's half-width is at most ``margin``; None: out of reach.

    It never falls under 1.96 standard deviations, however many seeds there are.
    """
    return _fewest(lambda n: t_quantile(n) * deviation * math.sqrt(1 + 1 / n), margin)


def seeds_to_decide(
    distance: float, deviation: float, confidence: float = CONFIDENCE
) -> int | None:
    """Seeds until a mean this far from its threshold stands clear of it; None: out of reach."""
    return _fewest(lambda n: t_quantile(n, confidence) * deviation / math.sqrt(n), abs(distance))


def _fewest(half_width: Callable[[int], float], allowed: float) -> int | None:
    """The smallest number of seeds at which a half-width, which falls with it, is small enough."""
    counts = range(FEWEST_SEEDS, MOST_SEEDS + 1)
    place = bisect_left(counts, True, key=lambda n: half_width(n) <= allowed)
    return counts[place] if place < len(counts) and allowed > 0 else None


def area(curve: Curve, start: float, end: float) -> float:
    """Mean height of a curve between two updates: the area under it divided by its width, in nats.

    Dividing by the width makes it comparable with losses and with a table's margin.
    """
    inner = curve.updates[(curve.updates > start) & (curve.updates < end)]
    grid = np.concatenate(([start], inner, [end]))
    heights = np.interp(grid, curve.updates, curve.values)
    return float(np.trapezoid(heights, grid) / (end - start))


def updates_to_reach(curve: Curve, level: float) -> float:
    """The first update at which a loss is at or under ``level``; infinity if it never is."""
    reached = np.flatnonzero(curve.values <= level)
    return float(curve.updates[reached[0]]) if len(reached) else math.inf


def lead(curve: Curve, other: Curve) -> float:
    """Updates ``curve`` needs to reach the final loss of ``other``, less those ``other`` needs.

    A curve that ends higher never gets there; then it is by how much ``other`` is ahead in the same
    sense, with a plus sign. So exchanging the two changes the sign and nothing else, and curves
    without a difference give values around zero.
    """
    if curve.values[-1] > other.values[-1]:
        return -lead(other, curve)
    level = float(other.values[-1])
    return updates_to_reach(curve, level) - updates_to_reach(other, level)


FEWEST_INNER_POINTS = 5
"""A roughness over fewer points says nothing."""


def roughness(curve: Curve) -> float | None:
    """How far a curve jumps about its own course, in nats; None under five points to tell by.

    Over the second half of the updates (warm-up and departure from chance lie before), each point's
    distance from the straight line between its two neighbours. Its square is divided by what
    independent noise of variance 1 would make it, 1 + a² + (1 - a)² with the point at a share a of
    the way between them (1.5 at even steps). The root of the mean is the standard deviation of the
    noise that would make the curve as rough. Bends count too, if they are sharp from one row to
    the next.
    """
    u, v = curve.updates, curve.values
    if len(u) < 3:
        return None
    inner = np.flatnonzero(u[1:-1] >= (u[0] + u[-1]) / 2) + 1
    if len(inner) < FEWEST_INNER_POINTS:
        return None
    share = (u[inner] - u[inner - 1]) / (u[inner + 1] - u[inner - 1])
    distance = v[inner] - (1 - share) * v[inner - 1] - share * v[inner + 1]
    return math.sqrt(float(np.mean(distance**2 / (1 + share**2 + (1 - share) ** 2))))


def mean_and_range(
    curves: Sequence[Curve],
) -> tuple[Floats, Floats, Floats, Floats]:
    """updates, mean, lowest and highest [N] over the updates that all curves span.

    Curves logged at other updates than the first are read off between their points.
    """
    start = max(curve.updates[0] for curve in curves)
    end = min(curve.updates[-1] for curve in curves)
    updates = curves[0].updates
    updates = updates[(updates >= start) & (updates <= end)]
    if not len(updates):
        updates = np.array([start])
    stacked = np.stack([np.interp(updates, curve.updates, curve.values) for curve in curves])
    return updates, stacked.mean(0), stacked.min(0), stacked.max(0)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x."""
    dx = np.asarray(x, dtype=np.float64) - np.mean(x)
    return float(dx @ np.asarray(y, dtype=np.float64) / (dx @ dx))


def known_decimals(interval: Interval, *, most: int = 4, alone: int = 4) -> int:
    """Decimals worth printing: two digits of the interval's half-width, between 0 and ``most``.

    ``alone`` is used where there is no interval to judge by.
    """
    half = interval.half_width
    if not interval.enough or not math.isfinite(half):
        return alone
    if half <= 0:
        return most
    return min(max(1 - math.floor(math.log10(half)), 0), most)


def span(values: Sequence[float], form: str) -> str:
    """ "low to high" in a format, or one number where the two print alike."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
