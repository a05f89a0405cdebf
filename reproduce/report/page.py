"""The page: one HTML file with its figures inside, no network, printable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reproduce.records import RunRecord, Stage
from reproduce.report.answers import answers
from reproduce.report.caveats import joined, run_caveats
from reproduce.report.claims import FALSE_ANYWHERE, FALSE_VERDICTS, ClaimResult, PartResult
from reproduce.report.deviations import Deviation
from reproduce.report.figures import Drawn
from reproduce.report.findings import Finding, diagnostics
from reproduce.report.measured import LOSS, STAGES, Run, Work
from reproduce.report.privacy import without_paths
from reproduce.report.published import CHANCE, Published
from reproduce.report.scale import STAGE_NAMES, Scale
from reproduce.report.statistics import CONFIDENCE, FEWEST_SEEDS, MOST_SEEDS, Interval
from reproduce.report.tables import (
    Row,
    expectation,
    interval_cells,
    part_cells,
    rounded,
    training_windows,
)

_NUMBER_ORDER = ("reproduced", "differs", "inconclusive", "too few seeds", "not measured")

_COMES_BACK = {"supported": "comes back", "contradicted": "reversed"}
"""What is asked of recipes that repeat what was written or run isn't whether a claim holds."""
_OUT_OF_REACH = f"over {MOST_SEEDS}"
_FEWEST = f"{FEWEST_SEEDS} needed"


@dataclass(frozen=True)
class Badge:
    """A verdict as it is shown: its words, how it looks, and what stands small beside it.

    It is solid only without a caveat (``noted``), and looks like no verdict where the runs can't
    give one (``void``).
    """

    text: str
    look: str
    note: str = ""


def _badge(verdict: str, *, void: bool, noted: bool, repeats: bool, note: str = "") -> Badge:
    """``repeats``: of a recipe that is asked whether published differences come back."""
    weight = "void" if void else "noted" if noted else ""
    text = _COMES_BACK.get(verdict, verdict) if repeats else verdict
    return Badge(text, f"{verdict.replace(' ', '-')} {weight}".strip(), note)


@dataclass(frozen=True)
class Report:
    """Everything the page shows, computed."""

    published: Published
    works: Sequence[Work]
    scales: Sequence[Scale]
    tables: dict[Stage, list[Row]]
    claims: Sequence[ClaimResult]
    figures: Sequence[Drawn]
    headlines: Sequence[Finding]
    findings: Sequence[Finding]
    deviations: Sequence[Deviation]


def render(report: Report) -> str:
    """The report as one self-contained HTML document."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_private,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template("page.html.j2").render(
        chance=f"{CHANCE:.4f}",
        gap=f"{report.published.chance_gap:.4f}",
        recipes=[work.name for work in report.works],
        summaries=[_summary(report, *item) for item in zip(report.works, report.scales)],
        rates=_rates(report.published),
        overview_size=len(report.published.claims),
        fewest=FEWEST_SEEDS,
        several=len(report.works) > 1,
        repeats=any(work.repeats for work in report.works),
        overview=_overview(report),
        nowhere=_nowhere(report),
        headlines=[headline.text for headline in report.headlines if not headline.recipe],
        margins={
            stage: rounded(report.published.margins[stage], {"pretrain": 4, "finetune": 2}[stage])
            for stage in STAGES
        },
        pretrain=_sections(report, "pretrain", _pretrain),
        finetune=_sections(report, "finetune", _finetune),
        notes=_notes(report),
        claims=_claims(report),
        **_figures(report),
        findings=[
            {
                "stage": STAGE_NAMES[stage],
                "items": [item for item in report.findings if item.stage == stage],
                "arms": [
                    (work.name, headings, cells)
                    for work in report.works
                    for headings, cells in [diagnostics(work, stage)]
                    if cells and len(headings) > 1
                ],
            }
            for stage in STAGES
            if report.works or any(item.stage == stage for item in report.findings)
        ],
        provenance=[_provenance(work) for work in report.works],
        deviations=report.deviations,
        configuration=report.published.configuration,
    )


def _figures(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Those to see, and those that show only what was published beside nothing measured."""
    shown: dict[str, list[dict[str, Any]]] = {"figures": [], "unmeasured": []}
    for figure in report.figures:
        shown["figures" if figure.measured or not report.works else "unmeasured"].append(
            {
                "name": figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "panels": [Markup(panel) for panel in figure.panels],
            }
        )
    return shown


def _private(value: Any) -> Any:
    """Every text the page shows, but markup, without places on the machine."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return without_paths(value)
    return value


def _rates(published: Published) -> dict[str, str]:
    """False verdicts by accident, in per cent: of one number, of all; of one claim, of all."""
    numbers = len(published.numbers)
    return {
        "number": f"{100 * (1 - CONFIDENCE):.0f}",
        "numbers": str(numbers),
        "any_number": f"{100 * (1 - CONFIDENCE**numbers):.0f}",
        "claim": " to ".join(f"{100 * share:.0f}" for share in FALSE_VERDICTS),
        "any_claim": f"{100 * FALSE_ANYWHERE:.0f}",
    }


def _sections(
    report: Report, stage: Stage, show: Callable[[Row], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A stage's table by recipe; unpublished arms without a run are named, not tabled."""
    sections = []
    for recipe, group in groupby(report.tables[stage], attrgetter("recipe")):
        rows = list(group)
        shown = [row for row in rows if row.published or row.judged.count or _began(report, row)]
        work = next((work for work in report.works if work.name == recipe), None)
        runs = [run for arm in work.arms(stage) for run in work.of(stage, arm)] if work else []
        sections.append(
            {
                "recipe": recipe,
                "rows": [show(row) for row in shown],
                "without": ", ".join(row.arm for row in rows if row not in shown),
                "folded": (
                    f"No {STAGE_NAMES[stage]} run yet; {sum(bool(r.published) for r in rows)} "
                    "published numbers"
                    if work and not runs
                    else ""
                ),
            }
        )
    return sections


def _began(report: Report, row: Row) -> bool:
    return any(work.of(row.stage, row.arm) for work in report.works if work.name == row.recipe)


def _claims(report: Report) -> list[dict[str, Any]]:
    """Claims by recipe: those measured, and those that nothing is measured of, for a line."""
    sections = []
    for recipe, group in groupby(report.claims, attrgetter("recipe")):
        results = list(group)
        idle = [r for r in results if recipe and r.verdict == "not measured" and not _any(r)]
        sections.append(
            {
                "recipe": recipe,
                "shown": [_claim(r, _repeats(report, recipe)) for r in results if r not in idle],
                "idle": [_claim(r, _repeats(report, recipe)) for r in idle],
            }
        )
    return sections


def _any(result: ClaimResult) -> bool:
    """Whether any part of a claim has a value."""
    return any(part.interval.count for part in result.parts)


def _repeats(report: Report, recipe: str) -> bool:
    return any(work.repeats for work in report.works if work.name == recipe)


def _summary(report: Report, work: Work, scale: Scale) -> dict[str, Any]:
    """What the top of the page says about one recipe."""
    numbers = []
    for stage in STAGES:
        rows = [row for row in report.tables[stage] if row.recipe == work.name and row.published]
        counts: Counter[str] = Counter(row.verdict for row in rows)
        numbers.append(
            {
                "stage": STAGE_NAMES[stage],
                "total": len(rows),
                "counts": [
                    (_number_badge([row for row in rows if row.verdict == v]), counts[v])
                    for v in _NUMBER_ORDER
                    if counts[v]
                ],
                "by_accident": _by_accident(rows),
                "caveats": _caveats(work, stage),
                "runs": any(work.of(stage, arm) for arm in work.arms(stage)),
            }
        )
    return {
        "recipe": work.name,
        "data": scale.data,
        "answers": answers(
            work,
            {s: [row for row in report.tables[s] if row.recipe == work.name] for s in STAGES},
            [result for result in report.claims if result.recipe == work.name],
        ),
        "numbers": numbers,
        "headlines": [h.text for h in report.headlines if h.recipe == work.name],
    }


def _by_accident(rows: Sequence[Row]) -> str:
    """How many of the judged numbers would differ if the study reproduced to perfection."""
    judged = sum(row.judged.enough for row in rows)
    if not judged:
        return ""
    expected = (1 - CONFIDENCE) * judged
    return f"of a perfect reproduction about {expected:.1f} of {judged} would differ by accident"


def _number_badge(rows: Sequence[Row], note: str = "") -> Badge:
    """The badge of rows that share a verdict."""
    return _badge(
        rows[0].verdict,
        void=all(row.ignorant for row in rows),
        noted=any(row.caveat for row in rows),
        repeats=False,
        note=note,
    )


def _claim_badge(result: ClaimResult, repeats: bool) -> Badge:
    return _badge(
        result.verdict,
        void=bool(result.untestable),
        noted=bool(result.caveat),
        repeats=repeats,
        note=result.caveat,
    )


def _overview(report: Report) -> list[dict[str, Any]]:
    """A row a claim: its verdict and caveat in each recipe; without those measured nowhere."""
    return [
        {
            "name": claim.name,
            "statement": claim.statement,
            "results": [
                (result.recipe, _claim_badge(result, _repeats(report, result.recipe)))
                for result in report.claims
                if result.claim.name == claim.name
            ],
        }
        for claim in report.published.claims
        if claim.name not in _nowhere(report)
    ]


def _nowhere(report: Report) -> list[str]:
    """Claims that no recipe measured anything of."""
    measured = {r.claim.name for r in report.claims if _any(r) or r.verdict != "not measured"}
    return [claim.name for claim in report.published.claims if claim.name not in measured]


def _caveats(work: Work, stage: Stage) -> str:
    """How many finished runs ended at chance, without text and so on."""
    runs = [run for arm in work.arms(stage) for run in work.of(stage, arm)]
    finished = [run for run in runs if run.status == "finished"]
    text = f"{len(finished)} of {len(runs)} runs finished"
    for what, count in Counter(w for run in runs for w in run_caveats(run)).most_common():
        text += f", {count} {what}"
    missing = sum(len(work.missing(stage, arm)) for arm in work.arms(stage))
    return text + (f", {missing} planned but missing" if missing else "")


def _spread(interval: Interval, stage: Stage) -> str:
    mean, low, high = interval_cells(interval, stage)
    return f"{mean} [{low}, {high}]" if low else mean


def _needed(row: Row) -> str:
    if row.verdict == "too few seeds":
        return _FEWEST
    if row.verdict != "inconclusive" or row.ignorant:
        return ""
    return f"narrow enough from {row.needed} seeds" if row.needed else "spread exceeds the margin"


def _pretrain(row: Row) -> dict[str, Any]:
    interval = _spread(row.judged, "pretrain")
    return _row(row) | {
        "icsl": {True: "yes", False: "no", None: ""}[row.icsl],
        "measured": interval,
        "chance": rounded(row.chance, 4),
        "skill": rounded(row.skill, 3),
        "speech_skill": rounded(row.speech_skill, 3),
    }


def _finetune(row: Row) -> dict[str, Any]:
    return _row(row) | {
        "train": _spread(row.judged, "finetune"),
        "valid": _spread(row.beside, "finetune"),
        "wer": rounded(row.wer, 3),
        "cer": rounded(row.cer, 3),
        "blank": rounded(row.blank_rate, 3),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "recipe": row.recipe,
        "arm": row.arm,
        "size": "" if row.size is None else row.size,
        "published": row.published.text if row.published else "",
        "mark": "*" if row.published and not row.published.tabled else "",
        "seeds": row.judged.count,
        "badge": _number_badge([row], _needed(row)) if row.verdict else None,
        "caveat": row.caveat,
    }


def _notes(report: Report) -> dict[Stage, str]:
    """Where table and figure disagree, and where a starred number comes from."""
    published = report.published
    apart = [
        f"{arm} {number.text} and {figure.text}"
        for arm, figure in published.by_codebooks.items()
        if (number := published.numbers["pretrain", arm]).tabled
        and abs(number.value - figure.value) > number.plus_minus + figure.plus_minus
    ]
    return {
        "pretrain": (
            "* read off figure 4 of the paper (± 0.0001), which has no log behind it. Table 1 and "
            f"figure 4 disagree: {'; '.join(apart)}. Which epoch or average the table prints isn't "
            "established."
        ),
        "finetune": (
            "* last printed training window of the run log; the published table has no row without "
            "RVQ."
        ),
    }


def _claim(result: ClaimResult, repeats: bool) -> dict[str, Any]:
    return {
        "recipe": result.recipe,
        "name": result.claim.name,
        "statement": result.claim.statement,
        "source": result.claim.source,
        "note": result.claim.note,
        "badge": _claim_badge(result, repeats),
        "parts": [_part(part, repeats, void=bool(result.untestable)) for part in result.parts],
    }


def _part(result: PartResult, repeats: bool, *, void: bool) -> dict[str, Any]:
    published, measured, low, high, seeds = part_cells(result)
    needed, windows = result.doubt, training_windows(result)
    wider = result.confidence > CONFIDENCE
    if result.verdict == "too few seeds":
        needed = needed or _FEWEST
    elif result.verdict == "inconclusive" and not needed and not void:
        needed = f"to decide: {f'about {result.needed}' if result.needed else _OUT_OF_REACH} seeds"
    return {
        "text": expectation(result),
        "published_note": "training windows" if result.of_training_windows else "",
        "measured_note": joined(
            f"{100 * result.confidence:.3g} % interval" if low and wider else "",
            f"training windows: {windows}" if windows else "",
        ),
        "unit": result.unit,
        "published": published,
        "measured": f"{measured} [{low}, {high}]" if low else measured,
        "seeds": seeds,
        "badge": _badge(
            result.verdict, void=void, noted=bool(result.caveat), repeats=repeats, note=needed
        ),
    }


def _provenance(work: Work) -> dict[str, Any]:
    """Where a recipe's numbers come from: what all its runs ran on, and each run."""
    runs = list(work.runs.values())
    records = [run.record for run in runs if run.record]
    facts: dict[str, set[str | None]] = {
        "code (git)": {record.git for record in records},
        "versions": {", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records},
        "device": {record.device for record in records},
        "precision": {record.precision for record in records},
        "processes a run": {str(record.world_size) for record in records},
        "data (sha256)": {record.manifest_sha256[:8] for record in records},
        "recipe of each arm (sha256)": {record.recipe_sha256[:8] for record in records},
        "began": {min((r.started for r in records if r.started), default="")},
        "ended": {max((r.ended for r in records if r.ended), default="")},
        f"wall time{_of_one_process(records)}": {_hours(_once_a_bank(runs, _wall_seconds))},
        "audio trained on": {_hours(_once_a_bank(runs, _audio_seconds))},
    }
    shown = {key: ", ".join(sorted(filter(None, values))) for key, values in facts.items()}
    return {
        "recipe": work.name,
        "facts": [(key, value) for key, value in shown.items() if value],
        "runs": [
            _run(run)
            for stage in STAGES
            for arm in work.arms(stage)
            for run in work.of(stage, arm)
        ]
        + [
            {"name": f"{stage}/{arm}/seed-{seed}", "status": "missing", "outcome": "",
             "updates": "", "train": "", "valid": "", "time": "", "reason": ""}
            for stage in STAGES
            for arm in work.arms(stage)
            for seed in work.missing(stage, arm)
        ],
    }  # fmt: skip


def _run(run: Run) -> dict[str, str]:
    stage, record = run.folder.stage, run.record
    updates = run.column("train", "update")
    reached = f"{updates[-1]:.0f}" if len(updates) else "0"
    planned = record.updates_planned if record else 0
    reasons = (record.reason if record else "", run.suspect, run.problem, run.codes.problem)
    return {
        "name": run.folder.name,
        "status": run.status,
        "outcome": run.outcome.replace("_", " "),
        "updates": f"{reached} of {planned}" if planned else reached,
        "train": rounded(run.final("train", LOSS[stage]), 4),
        "valid": rounded(run.final("valid", LOSS[stage]), 4),
        "time": _hours(record.wall_seconds) if record else "",
        "reason": "; ".join(filter(None, reasons)),
    }


def _once_a_bank(runs: Iterable[Run], seconds: Callable[[Run], float]) -> float:
    """A sum over runs, those that were trained together from one pass counted once, the longest."""
    longest: dict[tuple[Stage, int, tuple[str, ...]], float] = {}
    for run in runs:
        bank = tuple(sorted(run.record.bank)) if run.record else ()
        key = run.folder.stage, run.folder.seed, bank or (run.folder.arm,)
        longest[key] = max(longest.get(key, 0.0), seconds(run))
    return math.fsum(longest.values())


def _audio_seconds(run: Run) -> float:
    curve = run.curve("train", "audio_seconds")
    return float(curve.values[-1]) if len(curve) else 0.0


def _wall_seconds(run: Run) -> float:
    return run.record.wall_seconds if run.record else 0.0


def _of_one_process(records: Iterable[RunRecord]) -> str:
    most = max((record.world_size for record in records), default=1)
    return f" (of one process of {most})" if most > 1 else ""


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
