"""How often verdicts are false where there is nothing to find. As a script: README's table.

Runs of all arms are alike but for noise, part of which the arms of a seed share. Whatever is then
called supported or contradicted is false; only that ICSL makes no difference with 2 codebooks is
true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from reproduce.records import Stage
from reproduce.report.claims import judge_claim
from reproduce.report.published import Published, load_published
from reproduce.report.statistics import Curve, number_verdict, prediction_interval

POINTS = 12
UPDATES = np.arange(1.0, POINTS + 1) * 10
DECAY = 2.0 * np.exp(-UPDATES / 30)


class NoEffect:
    """Finished runs of every arm, a source of claims.

    A run's curves are one decay for all, moved by noise of its own and of its seed, with noise
    at every point; ``own`` [arms, seeds] and ``point`` are in nats.
    """

    def __init__(self, arms: Mapping[str, int], seeds: int, rng: np.random.Generator) -> None:
        self.count, self.place = seeds, arms
        own = rng.normal(0, 0.01, (len(arms), seeds, 1))
        shared = rng.normal(0, 0.05, (1, seeds, 1))
        self.curves = DECAY + own + shared + rng.normal(0, 0.004, (len(arms), seeds, POINTS))

    def seeds(self, stage: Stage, arm: str) -> set[int]:
        return set(range(self.count))

    def final(self, stage: Stage, arm: str, seed: int, *, series: bool = False) -> float:
        return float(self.curves[self.place[arm], seed, -1])

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve:
        return Curve(UPDATES, self.curves[self.place[arm], seed])


def claims(published: Published, seeds: int, trials: int) -> Counter[tuple[str, str]]:
    """(claim, verdict) -> how often; ("any", "false"): trials with one on at least one claim."""
    rng = np.random.default_rng(seeds)
    arms = dict.fromkeys(arm for c in published.claims for part in c.parts for arm in part.arms)
    place = {arm: k for k, arm in enumerate(arms)}
    counts: Counter[tuple[str, str]] = Counter()
    for _ in range(trials):
        source = NoEffect(place, seeds, rng)
        verdicts = [judge_claim(c, published, source, "").verdict for c in published.claims]
        counts.update((c.name, v) for c, v in zip(published.claims, verdicts))
        counts["any", "false"] += any(v in ("supported", "contradicted") for v in verdicts)
    return counts


def numbers(
    seeds: int, trials: int, *, distance: float, deviation: float, margin: float = 0.0004
) -> Counter[str]:
    """Verdicts on a published number that lies ``distance`` from the runs' mean.

    With NaN it is one more run, from the same distribution.
    """
    rng = np.random.default_rng((seeds, int(1e6 * deviation)))
    runs: NDArray[np.float64] = rng.normal(0, deviation, (trials, seeds + 1))
    counts: Counter[str] = Counter()
    for row in runs:
        published = float(row[-1]) if np.isnan(distance) else distance
        predicted = prediction_interval([float(loss) for loss in row[:-1]])
        counts[number_verdict(published, 0.0, predicted, margin)] += 1
    return counts


def main(trials: int = 20_000) -> None:
    published = load_published()
    names = [claim.name for claim in published.claims]
    print(f"| no effect, {trials} trials | {' | '.join(names)} | any of the six |")
    print("| --- |" + " ---: |" * (len(names) + 1))
    for seeds in (3, 5, 10):
        counts = claims(published, seeds, trials)
        cells = [
            f"{100 * (counts[name, 'supported'] + counts[name, 'contradicted']) / trials:.1f} %"
            for name in names
        ]
        any_of_six = f"{100 * counts['any', 'false'] / trials:.1f} %"
        print(f"| {seeds} seeds | {' | '.join(cells)} | {any_of_six} |")
    print("\n| numbers | 3 seeds | 5 seeds | 10 seeds |\n| --- | ---: | ---: | ---: |")
    alike = [numbers(s, trials, distance=np.nan, deviation=0.0004)["differs"] for s in (3, 5, 10)]
    print(f"| `differs`, though it is one more such run | {_cells(alike, trials)} |")
    for margins in (2, 3):
        worst = [
            max(
                numbers(s, trials, distance=margins * 0.0004, deviation=d)["reproduced"]
                for d in np.geomspace(2e-5, 2e-3, 13)
            )
            for s in (3, 5, 10)
        ]
        print(
            f"| `reproduced`, though the mean lies {margins} margins away (worst spread) "
            f"| {_cells(worst, trials)} |"
        )


def _cells(counts: list[int], trials: int) -> str:
    return " | ".join(f"{100 * count / trials:.1f} %" for count in counts)


if __name__ == "__main__":
    main()
