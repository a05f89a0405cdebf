"""The page's first words: does the number come back, does the method help? From the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from reproduce.records import Stage
from reproduce.report.caveats import knowing
from reproduce.report.claims import DECIDED, ClaimResult
from reproduce.report.measured import STAGES, Work
from reproduce.report.scale import STAGE_NAMES
from reproduce.report.tables import Row

COMES_BACK, HELPS = "Does the number come back?", "Does the method help?"
_KNOWING: dict[Stage, str] = {"pretrain": "left chance", "finetune": "have a WER below 1"}


def answers(
    work: Work, rows: Mapping[Stage, Sequence[Row]], claims: Sequence[ClaimResult]
) -> list[tuple[str, str]]:
    """Question and answer, twice, for one recipe.

    Args:
        work: the recipe's runs.
        rows: its rows of both tables.
        claims: its claims, judged.
    """
    return [(COMES_BACK, _numbers(work, rows, claims)), (HELPS, _method(work, claims))]


def _numbers(work: Work, rows: Mapping[Stage, Sequence[Row]], claims: Sequence[ClaimResult]) -> str:
    if not work.repeats:
        return (
            "Not asked of this recipe: it changes what was run, so that the claims can be tested. "
            "Its losses stand beside the published ones all the same."
        )
    told: list[str] = []
    counts: Counter[str] = Counter()
    for stage in STAGES:
        judged = [row for row in rows[stage] if row.published and row.judged.enough]
        if not judged:
            told.append(f"No published {STAGE_NAMES[stage]} loss has three seeds here.")
            continue
        back = [row for row in judged if row.verdict == "reproduced"]
        apart = sum(row.verdict == "differs" for row in judged)
        wide = len(judged) - len(back) - apart
        counts.update(back=len(back), apart=apart)
        ignorant = sum(row.ignorant for row in back)
        told.append(
            f"Of {len(judged)} published {STAGE_NAMES[stage]} losses {len(back)} come back"
            + (f" ({ignorant} of them by runs that know nothing)" if ignorant else "")
            + f", {apart} differ"
            + (f", {wide} can't be told (the seeds spread too far)." if wide else ".")
        )
    void = sum(bool(claim.untestable) for claim in claims if claim.verdict in DECIDED)
    differences = _tally(claims, ("come back", "are reversed"))
    differences += f"; {void} of them by runs that know nothing" if void else ""
    told.append(f"Published differences: {differences}.")
    return " ".join([_short(counts["back"], counts["apart"]), *told])


def _method(work: Work, claims: Sequence[ClaimResult]) -> str:
    known = []
    for stage in STAGES:
        runs = [run for arm in work.arms(stage) for run in work.counted(stage, arm)]
        if runs:
            known.append(
                f"{knowing(runs)} of {len(runs)} {STAGE_NAMES[stage]} runs {_KNOWING[stage]}"
            )
    told = f" ({'; '.join(known)})" if known else ""
    if work.repeats:
        return (
            "Not asked of this recipe: whether a claim about the method holds is judged on runs "
            f"that know something, under corrected{told}."
        )
    found = Counter(result.verdict for result in claims)
    return (
        f"{_short(found['supported'], found['contradicted'])} Of {len(claims)} claims: "
        f"{_tally(claims, ('are supported', 'are contradicted'))}{told}."
    )


def _short(yes: int, no: int) -> str:
    """The answer in a word or two."""
    if yes and no:
        return "Partly."
    told = "Yes" if yes else "No"
    return f"{told}, where it can be told." if yes or no else "Not known yet."


def _tally(claims: Sequence[ClaimResult], words: tuple[str, str]) -> str:
    """How many claims have each verdict, and which; those that decide something first."""
    named = {
        "supported": words[0],
        "contradicted": words[1],
        "inconclusive": "are inconclusive",
        "not testable": "can't be tested",
        "too few seeds": "have too few seeds",
        "not measured": "aren't measured",
    }
    found = []
    for verdict, text in named.items():
        names = [result.claim.name for result in claims if result.verdict == verdict]
        if names or verdict in ("supported", "contradicted"):
            found.append(
                f"{len(names) or 'none'} {text}" + (f" ({', '.join(names)})" if names else "")
            )
    return ", ".join(found)
