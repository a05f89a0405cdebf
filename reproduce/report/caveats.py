"""What a reader has to know beside a verdict: runs that know nothing, failed, or aren't there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from reproduce.records import AT_CHANCE_MARGIN, Stage
from reproduce.report.measured import Run, Work, flatten
from reproduce.report.privacy import without_paths
from reproduce.report.published import ClaimPart
from reproduce.report.statistics import FEWEST_SEEDS

OUTCOMES = {"at_chance": "at chance", "all_blank": "without text", "collapsed": "collapsed"}
KNOWS_NOTHING: dict[Stage, str] = {
    "pretrain": "at chance or worse",
    "finetune": "without text or with a word error rate of 1 or more",
}


def caveat(work: Work, stage: Stage, arm: str) -> str:
    """What the outcomes of an arm's runs say, and which runs its numbers lack."""
    mixed = _mixed(work.counted(stage, arm), settings=True)
    return "; ".join([*_told(work, stage, arm, run_caveats), *mixed])


def claim_caveat(parts: Sequence[ClaimPart], work: Work) -> str:
    """Which runs parts of a claim lack, and whether those they have know anything; empty if all is
    well."""
    found = []
    for stage, arms in _arms(parts).items():
        lost: dict[str, list[str]] = {}
        for arm in arms:
            for text in _told(work, stage, arm, why_lost):
                lost.setdefault(text, []).append(arm)
        found += [text if of == arms else f"{', '.join(of)}: {text}" for text, of in lost.items()]
        runs = [run for arm in arms for run in work.counted(stage, arm)]
        if ignorant := sum(map(knows_nothing, runs)):
            which = f"{ignorant} of {len(runs)} runs end"
            if ignorant == len(runs):
                which = f"all {ignorant} runs end" if ignorant > 1 else "the only run ends"
            found.append(f"{which} {KNOWS_NOTHING[stage]}")
        found += _mixed(runs)
    return "; ".join(found)


def _told(work: Work, stage: Stage, arm: str, of_run: Callable[[Run], Sequence[str]]) -> list[str]:
    """What there is to say of an arm's runs, each with how many of them it concerns."""
    runs, missing = work.of(stage, arm), work.missing(stage, arm)
    if not runs:
        return ["no run yet" if arm in work.planned_arms(stage) else "not in the recipe"]
    counts = Counter(what for run in runs for what in of_run(run))
    if missing:
        counts["missing"] = len(missing)
    total = len(runs) + len(missing)
    return [
        what if count == total else f"{count} of {total} {what}" for what, count in counts.items()
    ]


def knows_nothing(run: Run) -> bool:
    """Whether a finished run is no better than guessing: at chance or worse, or all words wrong."""
    if run.folder.stage == "pretrain":
        return (skill := final_skill(run)) is not None and skill <= AT_CHANCE_MARGIN
    return run.outcome == "all_blank" or _misses_all(run)


def cannot_test(parts: Sequence[ClaimPart], work: Work) -> str:
    """Why these runs can't test parts of a claim: arms of which too few seeds know anything.

    Arms with too few finished seeds are another matter. Empty if they can be tested.
    """
    found = [
        f"{arm} {knowing(runs)} of {len(runs)}"
        for stage, arms in _arms(parts).items()
        for arm in arms
        if too_few_know(runs := work.counted(stage, arm))
    ]
    return f"seeds that know anything: {', '.join(found)}; {FEWEST_SEEDS} needed" if found else ""


def too_few_know(runs: Sequence[Run]) -> bool:
    """Whether an arm has seeds enough for a verdict, and too few of them know anything."""
    return knowing(runs) < FEWEST_SEEDS <= len(runs)


def knowing(runs: Sequence[Run]) -> int:
    """How many of some finished runs know anything."""
    return sum(not knows_nothing(run) for run in runs)


def _arms(parts: Sequence[ClaimPart]) -> dict[Stage, list[str]]:
    """The arms of parts by stage, each once."""
    stages = dict.fromkeys(part.stage for part in parts)
    return {
        stage: list(dict.fromkeys(a for part in parts if part.stage == stage for a in part.arms))
        for stage in stages
    }


def final_skill(run: Run) -> float | None:
    """Chance less loss on the last validation, in nats."""
    loss, chance = run.final("valid", "contrastive_loss"), run.final("valid", "chance_loss")
    return chance - loss if loss is not None and chance is not None else None


def above_chance(run: Run) -> bool:
    """Whether a run ends clearly worse than a model that knows nothing."""
    return (skill := final_skill(run)) is not None and skill < -AT_CHANCE_MARGIN


def _mixed(runs: Sequence[Run], *, settings: bool = False) -> list[str]:
    """Runs thrown together that were trained on different data or by different recipes.

    Seeds of one arm may well differ in the encoder they start from.
    """
    records = [run.record for run in runs if run.record]
    kinds = {"data sets": {record.manifest_sha256 for record in records}}
    if settings:
        kinds["recipes"] = {
            without_paths(
                repr(sorted((k, v) for k, v in flatten(record.settings) if k != "encoder_sha256"))
            )
            for record in records
        }
    return [f"runs of {len(found)} different {kind}" for kind, found in kinds.items()
            if len(found) > 1]  # fmt: skip


def why_lost(run: Run) -> list[str]:
    """Why a run's loss is in no number or claim; empty if it is."""
    if run.status != "finished":
        return ["diverged" if run.outcome == "diverged" else run.status]
    found = ["diverged"] if run.outcome == "diverged" else []
    if run.suspect:
        found.append(run.suspect)
    if run.counted and (lost := run.without_loss):
        names = " and ".join({"train": "training", "valid": "validation"}[split] for split in lost)
        found.append(f"without a finite {names} loss")
    return found


def run_caveats(run: Run) -> list[str]:
    """What there is to say of one run; empty if it finished and all is well."""
    found = why_lost(run)
    if run.counted:
        if run.outcome in OUTCOMES:
            found.append(OUTCOMES[run.outcome])
        if run.folder.stage == "pretrain" and above_chance(run):
            found.append("worse than chance")
        if run.folder.stage == "finetune" and run.outcome != "all_blank" and _misses_all(run):
            found.append("WER 1 or more")
    if run.problem:
        found.append(run.problem)
    return found


def _misses_all(run: Run) -> bool:
    return (wer := run.final("valid", "wer")) is not None and wer >= 1


def joined(*caveats: str) -> str:
    """Those there are, in one line."""
    return "; ".join(filter(None, caveats))
