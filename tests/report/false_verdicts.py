"""How often verdicts are false where there is nothing to find. As a script: the table of
docs/reading.md.

Runs of all arms are alike but for noise, part of which the arms of a seed share. Whatever is then
called supported or contradicted is false; only that ICSL makes no difference with 2 codebooks, and
that RVQ costs no loss, are true.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reproduce.records import Stage
from reproduce.report.claims import judge_claim
from reproduce.report.codes import Codes
from reproduce.report.published import Published, load_published
from reproduce.report.statistics import Curve, number_verdict, prediction_interval

WIDTH = 64
"""Dimensions of the features that the made-up codes are of."""


@dataclass(frozen=True)
class World:
    """How runs vary though no arm differs: nats between ``own`` runs, between seeds that arms
    ``share``, and from ``point`` to point of a curve of so many ``points``."""

    name: str
    own: float = 0.01
    share: float = 0.05
    point: float = 0.004
    points: int = 12


WORLDS = (World("runs alike"), World("runs far apart", own=0.3, points=30))
"""In the second one runs differ by more than they still learn, which is hard on "reaches a loss"
(see `reproduce.report.claims`)."""


class NoEffect:
    """Finished runs of every arm, a source of claims: one decay for all, and noise."""

    def __init__(
        self, arms: Mapping[str, int], seeds: int, rng: np.random.Generator, world: World
    ) -> None:
        self.count, self.place = seeds, arms
        self.updates = np.arange(1.0, world.points + 1) * 10
        decay = 2.0 * np.exp(-4.0 * self.updates / self.updates[-1])
        own = rng.normal(0, world.own, (len(arms), seeds, 1))
        shared = rng.normal(0, world.share, (1, seeds, 1))
        noise = rng.normal(0, world.point, (len(arms), seeds, world.points))
        self.curves = decay + own + shared + noise
        self.errors = rng.normal(0, world.own, (len(arms), seeds))

    def seeds(self, stage: Stage, arm: str) -> set[int]:
        return set(range(self.count))

    def final(
        self,
        stage: Stage,
        split: str,
        arm: str,
        seed: int,
        column: str = "",
        *,
        series: bool = False,
    ) -> float:
        return float(self.curves[self.place[arm], seed, -1])

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve:
        return Curve(self.updates, self.curves[self.place[arm], seed])

    def codes(self, stage: Stage, arm: str, seed: int) -> Codes:
        """Two levels of 256 codes, all in use, whose error falls as their bits make it fall in
        features without structure, but for noise."""
        noise = float(self.errors[self.place[arm], seed])
        left = math.exp(-2 * math.log(2) * 8 / WIDTH + noise)
        arrays = {"code_counts": np.ones((2, 256)), "mse": np.array([1.0, left])}
        return Codes(arrays, width=WIDTH)


def claims(
    published: Published, seeds: int, trials: int, world: World = WORLDS[0]
) -> Counter[tuple[str, str]]:
    """(claim, verdict) -> how often; ("any", "false"): trials with one on at least one claim."""
    rng = np.random.default_rng(seeds)
    arms = dict.fromkeys(arm for c in published.claims for part in c.parts for arm in part.arms)
    place = {arm: k for k, arm in enumerate(arms)}
    counts: Counter[tuple[str, str]] = Counter()
    for _ in range(trials):
        source = NoEffect(place, seeds, rng, world)
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


def false_shares(counts: Counter[tuple[str, str]], names: Sequence[str]) -> list[float]:
    """Share of trials with a false verdict on each claim."""
    trials = sum(count for (name, _), count in counts.items() if name == names[0])
    return [(counts[name, "supported"] + counts[name, "contradicted"]) / trials for name in names]


def any_differs(seeds: int, trials: int, count: int) -> float:
    """Share of studies with a false `differs` on at least one of so many numbers."""
    rng = np.random.default_rng((seeds, count))
    runs = rng.normal(0, 0.0004, (trials, count, seeds + 1))
    return float(np.mean([any(_differs(row) for row in study) for study in runs]))


def main(trials: int = 20_000) -> None:
    published = load_published()
    names = [claim.name for claim in published.claims]
    print(f"| no effect, {trials} trials | {' | '.join(names)} | any of them |")
    print("| --- |" + " ---: |" * (len(names) + 1))
    for world in WORLDS:
        for seeds in (3, 5):
            counts = claims(published, seeds, trials, world)
            shares = [*false_shares(counts, names), counts["any", "false"] / trials]
            cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
            print(f"| {seeds} seeds, {world.name} | {cells} |", flush=True)
    print("\n| numbers | 3 seeds | 5 seeds | 10 seeds |\n| --- | ---: | ---: | ---: |")
    alike = [numbers(s, trials, distance=np.nan, deviation=0.0004)["differs"] for s in (3, 5, 10)]
    print(f"| `differs`, though it is one more such run | {_cells(alike, trials)} |")
    count = len(published.numbers)
    anywhere = [any_differs(s, trials // 10, count) for s in (3, 5, 10)]
    shown = " | ".join(f"{100 * share:.0f} %" for share in anywhere)
    print(f"| ... at least one of the {count} published numbers does | {shown} |")
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


def _differs(losses: NDArray[np.float64]) -> bool:
    """Verdict on the last of some like runs by the interval of the others."""
    predicted = prediction_interval([float(loss) for loss in losses[:-1]])
    return number_verdict(float(losses[-1]), 0.0, predicted, 0.0004) == "differs"


def _cells(counts: list[int], trials: int) -> str:
    return " | ".join(f"{100 * count / trials:.1f} %" for count in counts)


if __name__ == "__main__":
    main()
