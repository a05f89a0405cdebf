"""The study's claims as tests on paired differences over seeds.

A claim of several parts is supported if all its parts are, contradicted if one is, else
inconclusive. "If all" needs no correction for the number of parts, since every one has to pass;
"if one" does: a part contradicts at 1 - 0.05/parts confidence (Bonferroni), so that a claim of four
parts isn't wrongly contradicted more often than a claim of one.

Two kinds of part need more than a clear interval. A slope is a statement about all its sizes and
has no verdict without all of them. Updates to reach a loss are no Student's t variable: where runs
differ by more than they still learn, whoever ends lower is ahead by nearly the whole run, so three
seeds on one side by accident look like a clear lead. So a lead counts if the area between the same
two curves, a mean, says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from reproduce.records import Stage
from reproduce.report.caveats import claim_caveat
from reproduce.report.measured import Work, codebooks_of
from reproduce.report.published import PRINTED_SPLIT, Claim, ClaimPart, Published
from reproduce.report.scale import Scale
from reproduce.report.statistics import (
    CONFIDENCE,
    FEWEST_SEEDS,
    Curve,
    Interval,
    area,
    lead,
    mean_interval,
    seeds_to_decide,
    slope,
    updates_to_reach,
)

ClaimVerdict = Literal["supported", "contradicted", "inconclusive", "too few seeds", "not measured"]
DECIDED = ("supported", "contradicted")


FALSE_VERDICTS = (0.01, 0.05)
"""Share of studies without any effect in which a claim is supported or contradicted, from the
safest claim to the least safe one (tests/report/false_verdicts.py)."""
FALSE_ANYWHERE = 0.16
"""... and in which at least one of the six is."""


class Source(Protocol):
    """What a claim is tested on: the runs of one recipe, or the published data."""

    def seeds(self, stage: Stage, arm: str) -> set[int]: ...

    def final(
        self, stage: Stage, split: str, arm: str, seed: int, *, series: bool = False
    ) -> float | None: ...

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve | None: ...


@dataclass(frozen=True)
class PartResult:
    """One test: the quantity over seeds, its 95 % interval of the mean, and a verdict.

    Attributes:
        part: with the arms that were measured: a slope may lack some.
        published: the same quantity of the published data, over the same arms.
        clearance: how far inside of what is expected the mean lies, in half-widths of the interval:
            over 1 it is supported; NaN without an interval.
        needed: how many seeds an undecided part would take at this mean and spread (None: it is
            decided, has too few seeds to tell, or is out of reach).
        doubt: why an interval that stands clear is no verdict; empty if it is one.
        never: seeds of which the first arm never reaches the loss that is asked for.
        beside: the same over training windows, if the published value is of those.
    """

    part: ClaimPart
    published: float | None
    values: tuple[float, ...]
    interval: Interval
    verdict: ClaimVerdict
    clearance: float = math.nan
    needed: int | None = None
    doubt: str = ""
    never: int = 0
    beside: Interval | None = None

    @property
    def unit(self) -> str:
        units = {"slope": "nats per doubling", "updates_to_reach": "updates"}
        return units.get(self.part.measure, "nats")

    @property
    def of_training_windows(self) -> bool:
        """Whether the published value is of training windows and the measured one isn't."""
        return self.part.measure == "final" and PRINTED_SPLIT[self.part.stage] != self.part.split

    @property
    def difference(self) -> float | None:
        """What was measured as a difference of losses, in nats: of a slope, over all its sizes."""
        if self.part.measure == "updates_to_reach":
            return None
        doublings = _doublings(self.part.arms) if self.part.measure == "slope" else [0.0, 1.0]
        return self.interval.mean * (max(doublings) - min(doublings))


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
        """The part the verdict hangs on: of those that share it the one that speaks least for the
        claim, so the weakest of a supported claim; without intervals the one of fewest seeds."""
        alike = [part for part in self.parts if part.verdict == self.verdict]
        return min(
            alike or self.parts,
            key=lambda p: p.interval.count if math.isnan(p.clearance) else p.clearance,
        )


def judge(published: Published, work: Work, scale: Scale) -> list[ClaimResult]:
    """Every claim, tested on one recipe's finished runs."""
    results = []
    for claim in published.claims:
        result = judge_claim(claim, published, work, work.name)
        small = scale.caveat({part.stage for part in claim.parts})
        caveats = filter(None, (small, claim_caveat(claim, work), result.caveat))
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
                PartResult(part, _one(part, published), (), nothing, "not measured")
                for part in claim.parts
            ),
        )
        for claim in published.claims
    ]


def judge_claim(claim: Claim, published: Published, source: Source, recipe: str) -> ClaimResult:
    """One claim, tested on any source of runs."""
    parts = len(claim.parts)
    results = [_judge_part(part, published, source, parts=parts) for part in claim.parts]
    judged = ClaimResult(recipe, claim, _together(results), tuple(results))
    caveats = [
        *dict.fromkeys(part.doubt for part in results if part.doubt),
        *dict.fromkeys(_unpaired(part, source) for part in claim.parts),
        _negligible(judged, published),
    ]
    return replace(judged, caveat="; ".join(filter(None, caveats)))


def _judge_part(part: ClaimPart, published: Published, source: Source, *, parts: int) -> PartResult:
    asked, part = part, _measured_arms(part, source)
    values = part_values(part, source)
    margin = published.margins[part.stage]
    interval = mean_interval(values)
    verdict, doubt = part_verdict(interval, part, margin, parts=parts), ""
    needed = _needed(interval, part, margin, parts=parts) if verdict == "inconclusive" else None
    if len(part.arms) < len(asked.arms):
        doubt = f"slope over {len(part.arms)} of {len(asked.arms)} sizes, so without a verdict"
        needed = None
    elif part.measure == "updates_to_reach" and verdict in DECIDED:
        steady = _judge_part(replace(part, measure="area"), published, source, parts=parts)
        if steady.verdict != verdict:
            doubt = "the area between the curves doesn't bear out the lead in updates"
            needed = steady.needed
    result = PartResult(
        part,
        _one(part, published),
        tuple(values),
        interval,
        "inconclusive" if doubt and verdict in DECIDED else verdict,
        clearance=_clearance(interval, part, margin),
        needed=needed,
        doubt=doubt,
        never=_never(part, source),
    )
    if not result.of_training_windows:
        return result
    printed = replace(part, split=PRINTED_SPLIT[part.stage])
    return replace(result, beside=mean_interval(part_values(printed, source)))


def _measured_arms(part: ClaimPart, source: Source) -> ClaimPart:
    """A slope is taken over the arms there are; one that is still short of seeds waits."""
    if part.measure != "slope":
        return part
    for fewest in (FEWEST_SEEDS, 1):
        arms = tuple(arm for arm in part.arms if len(source.seeds(part.stage, arm)) >= fewest)
        if len(arms) > 1:
            return replace(part, arms=arms)
    return part


def part_values(part: ClaimPart, source: Source) -> list[float]:
    """The quantity of a part for every seed that all its arms share, in order of seeds."""
    values = (_quantity(part, source, seed) for seed in _shared(part, source))
    return [value for value in values if value is not None]


def _shared(part: ClaimPart, source: Source) -> list[int]:
    return sorted(set.intersection(*(source.seeds(part.stage, arm) for arm in part.arms)))


def _quantity(part: ClaimPart, source: Source, seed: int) -> float | None:
    if part.measure in ("slope", "final"):
        series = part.measure == "slope"
        finals = (
            source.final(part.stage, part.split, arm, seed, series=series) for arm in part.arms
        )
        losses = [loss for loss in finals if loss is not None]
        if len(losses) < len(part.arms):
            return None
        return slope(_doublings(part.arms), losses) if series else losses[0] - losses[1]
    curve, other = (source.curve(part.stage, part.split, arm, seed) for arm in part.arms)
    if curve is None or other is None or len(curve) < 2 or len(other) < 2:
        return None
    if part.measure == "updates_to_reach":
        return lead(curve, other)
    start = max(curve.updates[0], other.updates[0])
    end = min(curve.updates[-1], other.updates[-1])
    return area(curve, start, end) - area(other, start, end) if end > start else None


def _doublings(arms: Sequence[str]) -> list[float]:
    return [math.log2(codebooks_of(arm, {}) or math.nan) for arm in arms]


def _never(part: ClaimPart, source: Source) -> int:
    """Seeds of which the first arm never reaches the final loss of the second."""
    if part.measure != "updates_to_reach":
        return 0
    pairs = (
        [source.curve(part.stage, part.split, arm, seed) for arm in part.arms]
        for seed in _shared(part, source)
    )
    return sum(
        math.isinf(updates_to_reach(curve, float(other.values[-1])))
        for curve, other in pairs
        if curve and other
    )


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


def _inside(interval: Interval, part: ClaimPart, margin: float) -> float:
    """How far the mean lies inside of what is expected; negative outside."""
    return {
        "below": -interval.mean,
        "above": interval.mean,
        "within": margin - abs(interval.mean),
    }[part.expected]


def _clearance(interval: Interval, part: ClaimPart, margin: float) -> float:
    inside, half = _inside(interval, part, margin), interval.half_width
    if not interval.enough:
        return math.nan
    if half > 0:
        return inside / half
    return math.copysign(math.inf, inside) if inside else 0.0


def _needed(interval: Interval, part: ClaimPart, margin: float, *, parts: int) -> int | None:
    """Seeds until it is decided at this mean and spread, one way or (more strictly) the other."""
    inside = _inside(interval, part, margin)
    confidence = CONFIDENCE if inside > 0 else 1 - (1 - CONFIDENCE) / parts
    return seeds_to_decide(inside, interval.deviation, confidence)


def _unpaired(part: ClaimPart, source: Source) -> str:
    """Arms whose seeds are others than one another's: only those in common are compared."""
    seeds = [source.seeds(part.stage, arm) for arm in _measured_arms(part, source).arms]
    common = len(set.intersection(*seeds))
    if common == min(map(len, seeds)):
        return ""
    return f"part {part.number}: its arms have {common or 'no'} seed{'s' * (common != 1)} in common"


def _negligible(result: ClaimResult, published: Published) -> str:
    """A difference may stand clear of 0 and yet be smaller than any that the study tells apart."""
    if result.verdict not in DECIDED:
        return ""
    small = [
        part.part
        for part in result.parts
        if part.verdict == result.verdict
        and part.part.expected != "within"
        and part.difference is not None
        and abs(part.difference) < published.margins[part.part.stage]
    ]
    if not small:
        return ""
    margin = published.margins[small[0].stage]
    text = f"decided by a difference under the table's margin of {margin:.2g} nats"
    if len(result.parts) > 1:
        text += f" (part {', '.join(str(part.number) for part in small)})"
    return text


def _one(part: ClaimPart, published: Published) -> float | None:
    values = part_values(part, published)
    return values[0] if values else None
