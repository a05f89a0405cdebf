"""The page's first words: what was learned, does the number come back, does the method help?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from reproduce.records import Stage
from reproduce.report.caveats import knowing
from reproduce.report.claims import DECIDED, ClaimResult
from reproduce.report.measured import LOSS, STAGES, Run, Work
from reproduce.report.scale import STAGE_NAMES
from reproduce.report.statistics import span
from reproduce.report.tables import Row

LEARNED = "Do the models know anything?"
COMES_BACK, HELPS = "Does the number come back?", "Does the method help?"


def answers(
    work: Work, rows: Mapping[Stage, Sequence[Row]], claims: Sequence[ClaimResult]
) -> list[tuple[str, str]]:
    """Questions and answers for one recipe: what its models learned, then the study's two.

    Args:
        work: the recipe's runs.
        rows: its rows of both tables.
        claims: its claims, judged.
    """
    learned = " ".join(filter(None, (_left_chance(work), _recognize(work))))
    return [
        (LEARNED, learned or "No run is finished."),
        (COMES_BACK, _numbers(work, rows, claims)),
        (HELPS, _method(work, claims)),
    ]


def _left_chance(work: Work) -> str:
    """How many pretraining runs are under chance, and by how much."""
    runs = _counted(work, "pretrain")
    skills = [
        chance - loss
        for run in runs
        if (loss := run.final("valid", LOSS["pretrain"])) is not None
        and (chance := run.final("valid", "chance_loss")) is not None
    ]
    if not skills:
        return ""
    return (
        f"{knowing(runs)} of {len(runs)} pretraining {_runs(runs)} left chance (chance less loss: "
        f"{span(skills, 'z.3f')} nats)."
    )


def _recognize(work: Work) -> str:
    """How many fine-tuning runs recognize anything, and how well each arm does."""
    runs = _counted(work, "finetune")
    rates = {arm: work.values("finetune", arm, "valid", "wer") for arm in work.arms("finetune")}
    means = [f"{arm} {np.mean(values):.2f}" for arm, values in rates.items() if values]
    if not means:
        return ""
    return (
        f"{knowing(runs)} of {len(runs)} fine-tuning {_runs(runs)} recognize something (a "
        f"word error rate below 1); means: {', '.join(means)}."
    )


def _counted(work: Work, stage: Stage) -> list[Run]:
    return [run for arm in work.arms(stage) for run in work.counted(stage, arm)]


def _runs(runs: Sequence[Run]) -> str:
    return "run" if len(runs) == 1 else "runs"


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
    differences = _tally(claims, ("that came back", "reversed"))
    differences += f"; {void} of them by runs that know nothing" if void else ""
    told.append(f"Published differences: {differences}.")
    return " ".join([_short(counts["back"], counts["apart"]), *told])


def _method(work: Work, claims: Sequence[ClaimResult]) -> str:
    if work.repeats:
        return (
            "Not asked of this recipe: whether a claim about the method holds is judged on runs "
            "that know something, under corrected."
        )
    found = Counter(result.verdict for result in claims)
    return (
        f"{_short(found['supported'], found['contradicted'])} Of {len(claims)} claims: "
        f"{_tally(claims, ('supported', 'contradicted'))}."
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
        "inconclusive": "inconclusive",
        "not testable": "not testable",
        "too few seeds": "with too few seeds",
        "not measured": "not measured",
    }
    found = []
    for verdict, text in named.items():
        names = [result.claim.name for result in claims if result.verdict == verdict]
        if names or verdict in ("supported", "contradicted"):
            found.append(
                f"{len(names) or 'none'} {text}" + (f" ({', '.join(names)})" if names else "")
            )
    return ", ".join(found)
