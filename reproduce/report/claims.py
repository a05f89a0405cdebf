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
from typing import Literal

from reproduce.report.caveats import cannot_test, claim_caveat, joined
from reproduce.report.measured import Work
from reproduce.report.measures import (
    Source,
    doublings,
    never_reached,
    of_losses,
    part_interval,
    part_values,
    unit_of,
)
from reproduce.report.published import PRINTED_SPLIT, Claim, ClaimPart, Published
from reproduce.report.scale import Scale
from reproduce.report.statistics import CONFIDENCE, FEWEST_SEEDS, Interval, mean_interval

ClaimVerdict = Literal[
    "supported", "contradicted", "inconclusive", "not testable", "too few seeds", "not measured"
]
DECIDED = ("supported", "contradicted")


FALSE_VERDICTS = (0.01, 0.05)
"""Share of studies without any effect in which a claim is supported or contradicted, from the
safest claim to the least safe one (tests/report/false_verdicts.py)."""
FALSE_ANYWHERE = 0.25
"""... and in which at least one of them is."""


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
        caveat: as of the claim, for this part's arms.
        used: the interval that the verdict uses: a mean on the other side than expected has to
            stand clear at a higher confidence.
        confidence: of that interval.
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
    used: Interval | None = None
    confidence: float = CONFIDENCE
    caveat: str = ""

    @property
    def shown(self) -> Interval:
        """The interval to print."""
        return self.used or self.interval

    @property
    def unit(self) -> str:
        return unit_of(self.part)

    @property
    def of_training_windows(self) -> bool:
        """Whether the published value is of training windows and the measured one isn't."""
        of_losses = self.part.measure == "final" and self.published is not None
        return of_losses and PRINTED_SPLIT[self.part.stage] != self.part.split

    @property
    def difference(self) -> float | None:
        """What was measured as a difference of losses, in nats: of a slope, over all its sizes."""
        if not of_losses(self.part):
            return None
        steps = doublings(self.part.arms) if self.part.measure == "slope" else [0.0, 1.0]
        return self.interval.mean * (max(steps) - min(steps))


@dataclass(frozen=True)
class ClaimResult:
    """A claim judged on one recipe; ``caveat``: why its verdict says little, if it does.

    ``untestable``: why its runs can't test the method, if they can't. A recipe that repeats what
    was written or run has its verdict all the same: whether the published differences come back.
    """

    recipe: str
    claim: Claim
    verdict: ClaimVerdict
    parts: tuple[PartResult, ...]
    caveat: str = ""
    untestable: str = ""

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
        speech = _over_speech(result, published, work)
        why = cannot_test(claim.parts, work)
        if why and not work.repeats and result.verdict in (*DECIDED, "inconclusive"):
            result, speech = _not_testable(result), ""
        parts = tuple(
            replace(part, caveat=joined(*_of_runs([part.part], part.verdict, why, work, scale)))
            for part in result.parts
        )
        caveat = joined(
            *_of_runs(claim.parts, result.verdict, why, work, scale), result.caveat, speech
        )
        results.append(replace(result, parts=parts, caveat=caveat, untestable=why))
    return results


def _of_runs(
    parts: Sequence[ClaimPart], verdict: ClaimVerdict, why: str, work: Work, scale: Scale
) -> tuple[str, str, str]:
    """What has to be told of the runs behind a claim or a part of it.

    ``why`` the claim as a whole can't be tested is said of a part whose own arms know enough.
    """
    untestable = verdict == "not testable"
    return (
        (cannot_test(parts, work) or why) if untestable else "",
        "" if untestable else scale.caveat({part.stage for part in parts}),
        claim_caveat(parts, work),
    )


def _not_testable(result: ClaimResult) -> ClaimResult:
    """No verdict on the method by runs that know nothing; their numbers stay."""
    parts = tuple(
        replace(part, verdict="not testable", needed=None)
        if part.verdict in (*DECIDED, "inconclusive")
        else part
        for part in result.parts
    )
    return replace(result, verdict="not testable", parts=parts, caveat="")


def _over_speech(result: ClaimResult, published: Published, work: Work) -> str:
    """Where a verdict over all masked frames isn't the one over masked frames of speech.

    To tell sound from silence alone lowers the loss over all frames.
    """
    parts = tuple(
        replace(part, column="speech_loss")
        if (part.column, part.split) == ("contrastive_loss", "valid") and part.measure != "area"
        else part
        for part in result.claim.parts
    )
    if result.verdict not in DECIDED or parts == result.claim.parts:
        return ""
    speech = judge_claim(replace(result.claim, parts=parts), published, work, work.name).verdict
    if speech in (result.verdict, "not measured", "too few seeds"):
        return ""
    return f"over frames of speech alone: {speech}"


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
    return replace(judged, caveat=joined(*caveats))


def _judge_part(part: ClaimPart, published: Published, source: Source, *, parts: int) -> PartResult:
    asked, part = part, _measured_arms(part, source)
    margin = published.margins[part.stage]
    interval = part_interval(part, source)
    verdict, doubt = part_verdict(interval, part, margin, parts=parts), ""
    needed = _needed(interval, part, margin, parts=parts) if verdict == "inconclusive" else None
    if len(part.arms) < len(asked.arms):
        doubt = f"slope over {len(part.arms)} of {len(asked.arms)} sizes, so without a verdict"
        needed = None
    elif part.measure == "updates_to_reach" and verdict in DECIDED:
        steady = _judge_part(replace(part, measure="area"), published, source, parts=parts)
        if steady.verdict != verdict:
            doubt = "the area between the curves doesn't bear that out"
            needed = steady.needed
    confidence = _confidence(interval, part, margin, parts=parts)
    result = PartResult(
        part,
        _one(part, published),
        tuple(part_values(part, source)),
        interval,
        "inconclusive" if doubt and verdict in DECIDED else verdict,
        clearance=_clearance(interval, part, margin),
        needed=needed,
        doubt=doubt,
        never=never_reached(part, source),
        used=interval.widened(confidence) if confidence > CONFIDENCE else interval,
        confidence=confidence,
    )
    if not result.of_training_windows:
        return result
    printed = replace(part, split=PRINTED_SPLIT[part.stage])
    return replace(result, beside=part_interval(printed, source))


def _measured_arms(part: ClaimPart, source: Source) -> ClaimPart:
    """A slope is taken over the arms there are; one that is still short of seeds waits."""
    if part.measure != "slope":
        return part
    for fewest in (FEWEST_SEEDS, 1):
        arms = tuple(arm for arm in part.arms if len(source.seeds(part.stage, arm)) >= fewest)
        if len(arms) > 1:
            return replace(part, arms=arms)
    return part


def part_verdict(interval: Interval, part: ClaimPart, margin: float, *, parts: int) -> ClaimVerdict:
    """Whether a quantity is where a claim says, at 95 % (see the module for "contradicted").

    Args:
        interval: of the mean of the quantity over seeds, at 95 %.
        part: what is expected: below 0, above 0, within the margin around 0, or not above it.
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
    elif part.expected == "not above":
        holds, fails = interval.high <= margin, wide.low > margin
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
        "not above": margin - interval.mean,
    }[part.expected]


def _confidence(interval: Interval, part: ClaimPart, margin: float, *, parts: int) -> float:
    """Of the interval that a verdict hangs on: higher where the mean speaks against the claim."""
    against = interval.enough and _inside(interval, part, margin) < 0
    return 1 - (1 - CONFIDENCE) / parts if against else CONFIDENCE


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
    return interval.seeds_to_decide(inside, confidence)


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
        and part.part.expected in ("below", "above")
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
