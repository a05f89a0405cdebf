"""The study's claims as tests on paired differences over seeds.

A claim of several parts is supported if all its parts are, contradicted if one is, else
inconclusive. "If all" needs no correction for the number of parts, since every one has to pass;
"if one" does: a part contradicts at 1 - 0.05/parts confidence (Bonferroni), so that a claim of four
parts isn't wrongly contradicted more often than a claim of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from reproduce.records import Stage
from reproduce.report.caveats import claim_caveat
from reproduce.report.measured import Work, codebooks_of
from reproduce.report.published import Claim, ClaimPart, Published
from reproduce.report.statistics import (
    CONFIDENCE,
    Curve,
    Interval,
    area,
    lead,
    mean_interval,
    seeds_to_decide,
    slope,
)

ClaimVerdict = Literal["supported", "contradicted", "inconclusive", "too few seeds", "not measured"]


class Source(Protocol):
    """What a claim is tested on: the runs of one recipe, or the published data."""

    def seeds(self, stage: Stage, arm: str) -> set[int]: ...

    def final(self, stage: Stage, arm: str, seed: int, *, series: bool = False) -> float | None: ...

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve | None: ...


@dataclass(frozen=True)
class PartResult:
    """One test: the quantity over seeds, its 95 % interval of the mean, and a verdict.

    ``needed`` is how many seeds an undecided part would take at this mean and spread (None: it is
    decided, has too few seeds to tell, or is out of reach).
    """

    part: ClaimPart
    published: float | None
    values: tuple[float, ...]
    interval: Interval
    verdict: ClaimVerdict
    needed: int | None

    @property
    def unit(self) -> str:
        units = {"slope": "nats per doubling", "updates_to_reach": "updates"}
        return units.get(self.part.measure, "nats")


@dataclass(frozen=True)
class ClaimResult:
    """A claim judged on one recipe; ``caveat``: why its verdict says little, if it does."""

    recipe: str
    claim: Claim
    verdict: ClaimVerdict
    parts: tuple[PartResult, ...]
    caveat: str = ""

    @property
    def deciding(self) -> PartResult:
        """The part the verdict hangs on: the first one that has the claim's own verdict."""
        return next((part for part in self.parts if part.verdict == self.verdict), self.parts[0])


def judge(published: Published, work: Work) -> list[ClaimResult]:
    """Every claim, tested on one recipe's finished runs."""
    results = []
    for claim in published.claims:
        result = judge_claim(claim, published, work, work.name)
        caveats = filter(None, (claim_caveat(claim, work), result.caveat))
        results.append(replace(result, caveat="; ".join(caveats)))
    return results


def published_claims(published: Published) -> list[ClaimResult]:
    """Every claim with its published numbers and nothing measured."""
    nothing = mean_interval([])
    return [
        ClaimResult(
            "",
            claim,
            "not measured",
            tuple(
                PartResult(part, _one(part, published), (), nothing, "not measured", None)
                for part in claim.parts
            ),
        )
        for claim in published.claims
    ]


def judge_claim(claim: Claim, published: Published, source: Source, recipe: str) -> ClaimResult:
    """One claim, tested on any source of runs."""
    results = []
    for part in claim.parts:
        values = part_values(part, source)
        margin = published.margins[part.stage]
        interval = mean_interval(values)
        verdict = part_verdict(interval, part, margin, parts=len(claim.parts))
        needed = None
        if verdict == "inconclusive":
            needed = _needed(interval, part, margin, parts=len(claim.parts))
        results.append(
            PartResult(part, _one(part, published), tuple(values), interval, verdict, needed)
        )
    judged = ClaimResult(recipe, claim, _together(results), tuple(results))
    return replace(judged, caveat=_negligible(judged, published))


def part_values(part: ClaimPart, source: Source) -> list[float]:
    """The quantity of a part for every seed that all its arms share, in order of seeds.

    A slope is taken over the arms that were measured, if there are two or more.
    """
    arms = list(part.arms)
    if part.measure == "slope":
        arms = [arm for arm in arms if source.seeds(part.stage, arm)]
        if len(arms) < 2:
            return []
    shared = set.intersection(*(source.seeds(part.stage, arm) for arm in arms))
    values = (_quantity(part, source, arms, seed) for seed in sorted(shared))
    return [value for value in values if value is not None]


def _quantity(part: ClaimPart, source: Source, arms: Sequence[str], seed: int) -> float | None:
    if part.measure in ("slope", "final"):
        series = part.measure == "slope"
        finals = [source.final(part.stage, arm, seed, series=series) for arm in arms]
        losses = [loss for loss in finals if loss is not None]
        if len(losses) < len(arms):
            return None
        if part.measure == "slope":
            doublings = [float(np.log2(codebooks_of(arm, {}) or np.nan)) for arm in arms]
            return slope(doublings, losses)
        return losses[0] - losses[1]
    curve, other = (source.curve(part.stage, part.split, arm, seed) for arm in arms)
    if curve is None or other is None or len(curve) < 2 or len(other) < 2:
        return None
    if part.measure == "updates_to_reach":
        return lead(curve, other)
    start = max(curve.updates[0], other.updates[0])
    end = min(curve.updates[-1], other.updates[-1])
    return area(curve, start, end) - area(other, start, end) if end > start else None


def part_verdict(interval: Interval, part: ClaimPart, margin: float, *, parts: int) -> ClaimVerdict:
    """Whether a quantity is where a claim says, at 95 % (see the module for "contradicted").

    Args:
        interval: of the mean of the quantity over seeds, at 95 %.
        part: what is expected: below 0, above 0, or within the margin around 0.
        margin: the table's margin, in nats.
        parts: how many parts the claim has.
    """
    if interval.count == 0:
        return "not measured"
    if not interval.enough:
        return "too few seeds"
    wide = interval.widened(1 - (1 - CONFIDENCE) / parts)
    if part.expected == "below":
        holds, fails = interval.high < 0, wide.low > 0
    elif part.expected == "above":
        holds, fails = interval.low > 0, wide.high < 0
    else:
        holds = -margin <= interval.low and interval.high <= margin
        fails = wide.low > margin or wide.high < -margin
    return "supported" if holds else "contradicted" if fails else "inconclusive"


def _together(parts: Sequence[PartResult]) -> ClaimVerdict:
    verdicts = [part.verdict for part in parts]
    if "contradicted" in verdicts:
        return "contradicted"
    for undecided in ("not measured", "too few seeds", "inconclusive"):
        if undecided in verdicts:
            return undecided
    return "supported"


def _needed(interval: Interval, part: ClaimPart, margin: float, *, parts: int) -> int | None:
    """Seeds until it is decided at this mean and spread, one way or (more strictly) the other."""
    inside = {
        "below": -interval.mean,
        "above": interval.mean,
        "within": margin - abs(interval.mean),
    }[part.expected]
    confidence = CONFIDENCE if inside > 0 else 1 - (1 - CONFIDENCE) / parts
    return seeds_to_decide(inside, interval.deviation, confidence)


def _negligible(result: ClaimResult, published: Published) -> str:
    """A difference may stand clear of 0 and yet be smaller than any that the study tells apart."""
    part = result.deciding
    margin = published.margins[part.part.stage]
    if result.verdict not in ("supported", "contradicted") or part.part.expected == "within":
        return ""
    if part.unit != "nats" or abs(part.interval.mean) >= margin:
        return ""
    return f"decided by a difference under the table's margin of {margin:.2g} nats"


def _one(part: ClaimPart, published: Published) -> float | None:
    values = part_values(part, published)
    return values[0] if values else None
