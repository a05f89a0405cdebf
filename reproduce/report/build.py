"""Build a report: read, judge, write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from reproduce.errors import UsageError
from reproduce.recipe import load_recipe
from reproduce.records import Stage, staged, write_text
from reproduce.report import page, tables
from reproduce.report.claims import ClaimResult, judge, published_claims
from reproduce.report.deviations import deviations
from reproduce.report.figures import draw_all
from reproduce.report.findings import findings
from reproduce.report.headlines import headlines
from reproduce.report.keep import keep_runs, require_place
from reproduce.report.measured import STAGES, Work, read_work
from reproduce.report.published import CHANCE, load_published
from reproduce.report.scale import scale_of
from reproduce.report.tables import Row, as_data, interval_data


@dataclass(frozen=True)
class ReportSummary:
    """What a script needs of a report.

    Attributes:
        page: path of ``index.html``.
        contradicted: "RECIPE: CLAIM" of every contradicted claim, for ``--strict``; not of those
            that its runs can't test.
        data: the content of ``summary.json``.
    """

    page: Path
    contradicted: list[str]
    data: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """``summary.json`` and where the page lies."""
        return {"page": str(self.page), **self.data}


def build_report(
    works: Sequence[Path], out: Path, *, published_only: bool = False, keep: bool = False
) -> ReportSummary:
    """Write the tables, claims, figures, ``summary.json`` and the page under ``out``.

    Args:
        works: work folders, side by side in the order given.
        out: folder to write into; made if it isn't there.
        published_only: the published data alone; ``works`` is then empty.
        keep: write ``out/runs`` too, a small copy of the one work folder's runs from which the
            same page can be made again (see `reproduce.report.keep`).

    Raises:
        UsageError: work folders with ``published_only``, or none without it; or one of them twice;
            or a folder in the way of the kept runs.
        DataError: a work folder doesn't exist or its recipe can't be read.
    """
    if published_only == bool(works):
        raise UsageError(
            "a report is of work folders or of the published data alone",
            do="give a recipe or --work DIR, or --published without them",
        )
    _refuse_twice(works)
    if keep and len(works) != 1:
        raise UsageError(
            f"runs are kept of one work folder, not of {len(works)}", do="give one --work DIR"
        )
    published = load_published()
    measured = named_apart([read_work(Path(work)) for work in works], works)
    as_run = load_recipe("as-run").model_dump() if measured else {}
    scales = [scale_of(published, work, as_run) for work in measured]
    rows: dict[Stage, list[Row]] = {s: tables.rows(published, s, measured) for s in STAGES}
    claims = [
        result for work, scale in zip(measured, scales) for result in judge(published, work, scale)
    ]
    if published_only:
        claims = published_claims(published)

    if keep:
        require_place(Path(works[0]), out)
    with staged(out) as new:
        if keep:
            keep_runs(measured[0], new)
        for name, table in (
            ("table_pretrain", tables.pretrain_table(rows["pretrain"])),
            ("table_finetune", tables.finetune_table(rows["finetune"])),
        ):
            write_text(new / f"{name}.csv", table.csv())
            write_text(new / f"{name}.md", table.markdown())
            write_text(new / f"{name}.tex", table.latex())
        claims_table = tables.claims_table(claims)
        write_text(new / "claims.csv", claims_table.csv())
        write_text(new / "claims.md", claims_table.markdown())

        report = page.Report(
            published=published,
            works=measured,
            scales=scales,
            tables=rows,
            claims=claims,
            figures=draw_all(published, measured, new),
            headlines=headlines(published, measured, scales),
            findings=findings(published, measured),
            deviations=[item for work in measured for item in deviations(work, as_run)],
        )
        write_text(new / "index.html", page.render(report))
        data = _to_digits(_data(report))
        write_text(new / "summary.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    return ReportSummary(out / "index.html", data["contradicted"], data)


def _refuse_twice(works: Sequence[Path]) -> None:
    """Raises: UsageError: two of the paths lead to the same folder."""
    resolved = [Path(work).resolve() for work in works]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UsageError(
                f"work folder given twice: as {works[resolved.index(folder)]} and {works[place]}",
                do="give each folder once",
            )


def named_apart(works: Sequence[Work], folders: Sequence[Path]) -> list[Work]:
    """Works under names that no two share: the report tells them apart by name.

    Recipes of the same name get their folder's name beside it, and where that is the same too,
    their place in the order given.
    """
    names = [work.name for work in works]
    beside = [Path(folder).resolve().name for folder in folders]
    places = [str(place) for place, _ in enumerate(works, 1)]
    for labels in chain([beside], repeat(places)):
        if len(set(names)) == len(names):
            break
        names = [
            f"{name} ({label})" if names.count(name) > 1 else name
            for name, label in zip(names, labels)
        ]
    return [replace(work, name=name) for work, name in zip(works, names)]


def _to_digits(value: Any) -> Any:
    """Numbers to 12 significant digits: what is finer is the rounding of sums."""
    if isinstance(value, dict):
        return {key: _to_digits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_digits(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _data(report: page.Report) -> dict[str, Any]:
    return {
        "recipes": [work.name for work in report.works],
        "chance": CHANCE,
        "margins": report.published.margins,
        **{f"table_{stage}": [as_data(row) for row in report.tables[stage]] for stage in STAGES},
        "claims": [_claim_data(result) for result in report.claims],
        "contradicted": [
            f"{result.recipe}: {result.claim.name}"
            for result in report.claims
            if result.verdict == "contradicted" and not result.untestable
        ],
        "headlines": [asdict(headline) for headline in report.headlines],
        "findings": [asdict(finding) for finding in report.findings],
        "runs": [
            {
                "recipe": work.name,
                "run": run.folder.name,
                "status": run.status,
                "outcome": run.outcome,
                "problem": "; ".join(filter(None, (run.suspect, run.problem))),
            }
            for work in report.works
            for run in work.runs.values()
        ],
    }


def _claim_data(result: ClaimResult) -> dict[str, Any]:
    return {
        "recipe": result.recipe,
        "claim": result.claim.name,
        "verdict": result.verdict,
        "caveat": result.caveat,
        "untestable": result.untestable,
        "parts": [
            {
                "quantity": part.part.quantity,
                "expected": part.part.expected,
                "unit": part.unit,
                "published": part.published,
                "values": list(part.values),
                **interval_data(part.shown),
                "verdict": part.verdict,
                "seeds_needed": part.needed,
                "never_reached": part.never,
                "doubt": part.doubt,
                "training_windows": interval_data(part.beside) if part.beside else None,
            }
            for part in result.parts
        ],
    }
