from __future__ import annotations

import math

import false_verdicts
import numpy as np
import pytest
import scipy.stats

from reproduce.report.statistics import (
    Curve,
    area,
    known_decimals,
    lead,
    mean_and_range,
    mean_interval,
    number_verdict,
    prediction_interval,
    roughness,
    seeds_to_decide,
    seeds_to_predict,
    slope,
    spread_interval,
    table_margin,
    updates_to_reach,
)


def test_mean_interval_is_students() -> None:
    values = [4.61, 4.62, 4.60, 4.65]
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    ours = mean_interval(values)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_prediction_interval_holds_one_more_run_95_times_in_100(count: int) -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(4.6, 0.01, (4000, count + 1))
    inside = sum(
        (interval := prediction_interval(row[:-1])).low <= row[-1] <= interval.high for row in draws
    )
    assert inside / len(draws) == pytest.approx(0.95, abs=0.012)


def test_intervals_of_few_values() -> None:
    assert prediction_interval([]).count == 0
    one = prediction_interval([4.6])
    assert one.mean == 4.6
    assert math.isnan(one.low)
    assert not prediction_interval([4.6, 4.7]).enough


@pytest.mark.parametrize(
    ("values", "published", "verdict"),
    [
        ([], 4.6120, "not measured"),
        ([4.612, 4.612], 4.6120, "too few seeds"),
        ([4.61199, 4.61200, 4.61201], 4.6120, "reproduced"),
        ([4.60, 4.612, 4.63], 4.6120, "inconclusive"),
        ([4.39, 4.40, 4.41], 4.6120, "differs"),
        ([4.39, 4.40, 4.41], None, ""),
        # no spread at all: the printed digits decide, 4.6120 may be 4.61204
        ([4.61204] * 3, 4.6120, "reproduced"),
        ([4.61206] * 3, 4.6120, "differs"),
    ],
)
def test_verdict_on_a_number(values: list[float], published: float | None, verdict: str) -> None:
    assert number_verdict(published, 0.00005, prediction_interval(values), 0.0004) == verdict


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_number_is_seldom_judged_wrongly(seeds: int) -> None:
    trials = 3000
    alike = false_verdicts.numbers(seeds, trials, distance=math.nan, deviation=0.0004)
    assert alike["differs"] / trials == pytest.approx(0.05, abs=0.012)
    for deviation in (0.0001, 0.0002, 0.0004):  # three margins away is not "reproduced"
        apart = false_verdicts.numbers(seeds, trials, distance=0.0012, deviation=deviation)
        assert apart["reproduced"] / trials <= 0.01


def test_widened_is_the_interval_at_that_confidence() -> None:
    values = [4.61, 4.62, 4.60, 4.65]
    ours, direct = mean_interval(values).widened(0.99), mean_interval(values, 0.99)
    assert (ours.low, ours.high) == pytest.approx((direct.low, direct.high))


def test_margin_is_half_the_smallest_step_between_neighbours() -> None:
    assert table_margin([4.6120, 4.6178, 4.6133, 4.6141]) == pytest.approx(0.0004)
    assert table_margin([4.59, 4.07, 3.87, 3.85, 3.99]) == pytest.approx(0.01)


@pytest.mark.parametrize(("distance", "deviation"), [(1.0, 1.0), (0.5, 1.0), (-0.2, 0.5)])
def test_seeds_to_decide_by_trying(distance: float, deviation: float) -> None:
    def clear(n: int) -> bool:
        return bool(scipy.stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n) <= abs(distance))

    assert seeds_to_decide(distance, deviation) == next(n for n in range(3, 999) if clear(n))


def test_seeds_out_of_reach() -> None:
    assert seeds_to_decide(0.0, 1.0) is None
    assert seeds_to_predict(1.0, 1.9) is None  # never under 1.96 standard deviations
    assert seeds_to_predict(1.0, 2.1) is not None


def test_area_is_the_mean_height() -> None:
    curve = Curve(np.array([0.0, 10.0, 30.0]), np.array([4.0, 2.0, 6.0]))
    grid = np.linspace(5, 30, 100_001)
    slow = np.interp(grid, curve.updates, curve.values).mean()
    assert area(curve, 5, 30) == pytest.approx(slow, rel=1e-4)
    assert area(curve, 0, 30) == pytest.approx((10 * 3 + 20 * 4) / 30)


def test_updates_to_reach() -> None:
    curve = Curve(np.array([10.0, 20.0, 30.0]), np.array([5.0, 4.0, 4.5]))
    assert updates_to_reach(curve, 4.2) == 20
    assert updates_to_reach(curve, 9.0) == 10
    assert updates_to_reach(curve, 3.0) == math.inf


def test_lead_changes_its_sign_when_curves_change_places() -> None:
    fast = Curve(np.array([10.0, 20.0, 30.0]), np.array([5.0, 3.0, 2.0]))
    slow = Curve(np.array([10.0, 20.0, 30.0]), np.array([5.0, 4.0, 3.5]))
    assert lead(fast, slow) == 20 - 30
    assert lead(slow, fast) == 30 - 20
    assert lead(fast, fast) == 0


def test_slope_is_least_squares() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [4.1, 4.0, 4.3, 4.2]
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_mean_and_range_over_seeds() -> None:
    whole = Curve(np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0]))
    cut = Curve(np.array([10.0, 20.0]), np.array([5.0, 4.0]))
    updates, mean, low, high = mean_and_range([whole, cut])
    assert updates.tolist() == [10, 20]
    assert mean.tolist() == [4, 3]
    assert low.tolist() == [3, 2]
    assert high.tolist() == [5, 4]


def test_decimals_follow_the_interval() -> None:
    assert known_decimals(prediction_interval([4.0, 4.5, 5.0])) == 1  # ± 2.5
    assert known_decimals(prediction_interval([4.60, 4.61, 4.62])) == 3  # ± 0.050
    assert known_decimals(prediction_interval([4.6, 4.6, 4.6])) == 4
    assert known_decimals(prediction_interval([4.6]), alone=2) == 2


def test_roughness_is_the_standard_deviation_of_the_noise() -> None:
    rng = np.random.default_rng(0)
    even = np.arange(4000.0)
    uneven = np.sort(rng.uniform(0, 4000, 4000))
    for updates in (even, uneven):
        trend = 4.0 + np.exp(-updates / 1000)
        curve = Curve(updates, trend + rng.normal(0, 0.03, len(updates)))
        assert roughness(curve) == pytest.approx(0.03, rel=0.05)
    # by hand: 5 inner points of the second half, 1 and -1 in turn, each 2 from its neighbours' line
    jumps = Curve(np.arange(12.0), (-1.0) ** np.arange(12))
    assert roughness(jumps) == pytest.approx(2 / math.sqrt(1.5))
    assert roughness(Curve(even, 5 - 0.001 * even)) == pytest.approx(0, abs=1e-12)
    first_half = np.where(even < 1990, rng.normal(0, 1, len(even)), 0)
    assert roughness(Curve(even, first_half)) == 0
    assert roughness(Curve(np.arange(8.0), np.arange(8.0))) is None


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_spread_interval_holds_the_ratio_95_times_in_100(seeds: int, shared: float) -> None:
    """Standard deviations in a ratio of 2, of seeds that share much or nothing."""
    rng, trials, inside = np.random.default_rng(seeds), 3000, 0
    covariance = np.array([[4.0, 2 * shared / 2.5], [2 * shared / 2.5, 1.0]])
    for _ in range(trials):
        x, y = rng.multivariate_normal([3.0, -1.0], covariance, seeds).T
        interval = spread_interval(x.tolist(), y.tolist())
        inside += interval.low <= math.log(2) <= interval.high
    assert inside / trials == pytest.approx(0.95, abs=0.012)


def test_spread_interval_is_pitman_and_morgans_test() -> None:
    """0 lies inside exactly where sum and difference of the pairs aren't clearly correlated."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        x, y = rng.normal(0, 2, 6), rng.normal(0, 1, 6)
        p = scipy.stats.pearsonr(x + y, x - y).pvalue
        interval = spread_interval(x.tolist(), y.tolist())
        assert (interval.low <= 0 <= interval.high) == (p >= 0.05)
        assert interval.mean == pytest.approx(math.log(x.std() / y.std()))
    wide = interval.widened(0.99)
    again = spread_interval(x.tolist(), y.tolist(), 0.99)
    assert (wide.low, wide.high) == pytest.approx((again.low, again.high))
    needed = interval.seeds_to_decide(0.5, 0.95)
    assert needed is not None
    assert needed > 6
    assert not math.isfinite(spread_interval([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).low)
