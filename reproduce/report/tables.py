"""The two tables and the claims, as rows with full precision and as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reproduce.records import Stage
from reproduce.report.caveats import caveat, joined, too_few_know
from reproduce.report.claims import ClaimResult, PartResult
from reproduce.report.latex import latex_table
from reproduce.report.measured import LOSS, Work, codebooks_of, icsl_of, levels_of
from reproduce.report.published import PRINTED_SPLIT, Published, PublishedNumber
from reproduce.report.statistics import (
    Interval,
    NumberVerdict,
    known_decimals,
    number_verdict,
    prediction_interval,
    seeds_to_predict,
)

PRETRAIN_TABLE = (
    "recipe", "arm", "codebooks", "icsl", "published", "mean", "low", "high", "seeds", "chance",
    "skill", "speech_skill", "verdict", "caveat",
)  # fmt: skip
FINETUNE_TABLE = (
    "recipe", "arm", "rvq_levels", "published", "train_mean", "train_low", "train_high",
    "valid_mean", "valid_low", "valid_high", "seeds", "wer", "cer", "blank_rate", "verdict",
    "caveat",
)  # fmt: skip
CLAIMS_TABLE = (
    "recipe", "claim", "statement", "published", "measured", "low", "high", "seeds", "verdict",
    "caveat",
)  # fmt: skip

DECIMALS: dict[Stage, int] = {"pretrain": 4, "finetune": 2}
"""As the study prints its tables; used where no interval says how much is known."""


@dataclass(frozen=True)
class Row:
    """One arm of one recipe against the published number; losses in nats.

    ``judged`` is what the verdict compares, of ``PRINTED_SPLIT``; ``beside`` is of the other split,
    training or validation. ``speech_skill``: chance less loss over masked frames of speech, with
    negatives among them. ``needed``: seeds until the interval is as narrow as the margin, None
    where that isn't the question or is out of reach. ``ignorant``: too few of its seeds know
    anything.
    """

    stage: Stage
    recipe: str
    arm: str
    size: int | None
    icsl: bool | None
    published: PublishedNumber | None
    judged: Interval
    beside: Interval
    chance: float | None
    speech_skill: float | None
    wer: float | None
    cer: float | None
    blank_rate: float | None
    verdict: NumberVerdict
    caveat: str
    needed: int | None
    ignorant: bool = False

    @property
    def skill(self) -> float | None:
        """Chance less loss: what the model knows beyond guessing."""
        known = self.chance is not None and self.judged.count > 0
        return self.chance - self.judged.mean if known and self.chance is not None else None


@dataclass(frozen=True)
class Table:
    """Cells as text, empty where nothing was measured."""

    columns: tuple[str, ...]
    rows: list[list[str]]

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
            for line in lines
        )

    def latex(self) -> str:
        """A booktabs tabular for print, without the columns that are empty."""
        return latex_table(self.columns, self.rows)


def rows(published: Published, stage: Stage, works: Sequence[Work]) -> list[Row]:
    """Every published and every planned or found arm of each recipe; without works, the published.

    Arms come in the study's order, others after them.
    """
    order = _in_order(published, stage)
    if not works:
        return [_row(published, stage, arm, None) for arm in order]
    return [
        _row(published, stage, arm, work)
        for work in works
        for arm in dict.fromkeys([*order, *work.arms(stage)])
    ]


def _in_order(published: Published, stage: Stage) -> list[str]:
    def place(arm: str) -> tuple[int, bool]:
        size = codebooks_of(arm, {}) if stage == "pretrain" else levels_of(arm, {})
        return (size or 0, bool(icsl_of(arm, {})))

    return sorted(published.arms(stage), key=place)


def _row(published: Published, stage: Stage, arm: str, work: Work | None) -> Row:
    number = published.numbers.get((stage, arm))
    overrides = work.overrides(stage, arm) if work else {}
    losses: dict[str, list[float]] = {
        split: work.values(stage, arm, split, LOSS[stage]) if work else []
        for split in ("train", "valid")
    }
    judged = prediction_interval(losses.pop(PRINTED_SPLIT[stage]))
    (beside,) = map(prediction_interval, losses.values())
    margin = published.margins[stage]
    verdict = number_verdict(
        number.value if number else None, number.plus_minus if number else 0.0, judged, margin
    )

    def average(column: str) -> float | None:
        values = work.values(stage, arm, "valid", column) if work else []
        return math.fsum(values) / len(values) if values else None

    pretraining = stage == "pretrain"
    speech = [average("speech_chance"), average("speech_loss")] if pretraining else [None]
    return Row(
        stage=stage,
        recipe=work.name if work else "",
        arm=arm,
        size=codebooks_of(arm, overrides) if pretraining else levels_of(arm, overrides),
        icsl=icsl_of(arm, overrides) if pretraining else None,
        published=number,
        judged=judged,
        beside=beside,
        chance=average("chance_loss") if pretraining else None,
        speech_skill=None if None in speech else speech[0] - speech[1],  # type: ignore[operator]
        wer=None if pretraining else average("wer"),
        cer=None if pretraining else average("cer"),
        blank_rate=None if pretraining else average("blank_rate"),
        verdict=verdict,
        caveat=caveat(work, stage, arm) if work else "",
        needed=(seeds_to_predict(judged.deviation, margin) if verdict == "inconclusive" else None),
        ignorant=work is not None and too_few_know(work.counted(stage, arm)),
    )


def pretrain_table(rows: Sequence[Row]) -> Table:
    return Table(PRETRAIN_TABLE, [_pretrain_cells(row) for row in rows])


def finetune_table(rows: Sequence[Row]) -> Table:
    return Table(FINETUNE_TABLE, [_finetune_cells(row) for row in rows])


def _pretrain_cells(row: Row) -> list[str]:
    known = known_decimals(row.judged, alone=DECIMALS["pretrain"])
    return [
        row.recipe, row.arm, _text(row.size), _yes(row.icsl),
        row.published.text if row.published else "", *interval_cells(row.judged, "pretrain"),
        _text(row.judged.count), rounded(row.chance, 4),
        rounded(row.skill, known), rounded(row.speech_skill, known), row.verdict, row.caveat,
    ]  # fmt: skip


def _finetune_cells(row: Row) -> list[str]:
    return [
        row.recipe, row.arm, _text(row.size), row.published.text if row.published else "",
        *interval_cells(row.judged, "finetune"), *interval_cells(row.beside, "finetune"),
        _text(row.judged.count), rounded(row.wer, 3), rounded(row.cer, 3),
        rounded(row.blank_rate, 3), row.verdict, row.caveat,
    ]  # fmt: skip


def claims_table(results: Sequence[ClaimResult]) -> Table:
    """One row a claim, with the numbers of the part its verdict hangs on, then a row a part.

    Parts are named C1.1, C1.2 and so on; a claim of one part has one row.
    """
    cells: list[list[str]] = []
    for result in results:
        name, parts, deciding = result.claim.name, result.parts, result.deciding
        notes = (
            [result.caveat, f"numbers of part {deciding.part.number}"]
            if len(parts) > 1
            else ([result.caveat, *part_notes(deciding)])
        )
        cells.append(
            [result.recipe, name, result.claim.statement, *part_cells(deciding), result.verdict,
             joined(*notes)]
        )  # fmt: skip
        for part in parts if len(parts) > 1 else ():
            cells.append(
                [result.recipe, f"{name}.{part.part.number}",
                 expectation(part), *part_cells(part), part.verdict,
                 joined(part.caveat, part.doubt, *part_notes(part))]
            )  # fmt: skip
    return Table(CLAIMS_TABLE, cells)


def expectation(result: PartResult) -> str:
    """What a part of a claim says, such as "final loss: a less b, below 0"."""
    expected = result.part.expected
    limit = "0" if expected in ("below", "above") else "the margin"
    return f"{result.part.quantity}, {expected} {limit}"


def part_notes(result: PartResult) -> list[str]:
    """In words, what the published value is of where that isn't what is measured."""
    if not result.of_training_windows:
        return []
    notes = ["published: of training windows"]
    if measured := training_windows(result):
        notes.append(f"measured there: {measured}")
    return notes


def training_windows(result: PartResult) -> str:
    """What is measured over training windows, unjudged; empty if that isn't beside the point."""
    if result.beside is None or not result.beside.count:
        return ""
    mean, low, high = _part_numbers(result, result.beside)
    return f"{mean} [{low}, {high}]" if low else mean


def part_cells(result: PartResult) -> list[str]:
    """published, measured, low, high, seeds of one part.

    Where a seed never reaches the loss asked for, that stands in place of a mean over updates.
    """
    cells = _part_numbers(result, result.shown)
    count = result.interval.count
    if result.never:
        cells = [f"never reached ({result.never} of {count} seeds)", "", ""]
    return [rounded(result.published, _most(result)), *cells, _text(count)]


def _most(result: PartResult) -> int:
    """The most decimals that a part's numbers are printed with."""
    if result.part.measure == "updates_to_reach":
        return 0
    if result.unit == "ln of a ratio" or result.part.stage == "finetune":
        return 3
    return 5 if result.part.measure == "slope" else 4


def _part_numbers(result: PartResult, interval: Interval) -> list[str]:
    most = _most(result)
    known = known_decimals(interval, most=most, alone=most)
    low, high = (interval.low, interval.high) if interval.enough else (None, None)
    cells = [rounded(value, known) for value in (interval.mean, low, high)]
    finer = most and known_decimals(interval, most=99, alone=0) > most
    if finer and 0 < abs(interval.mean) < 10.0 ** (1 - most):  # known, but below these decimals
        cells = ["" if v is None else f"{v:.1e}" for v in (interval.mean, low, high)]
    return cells


def interval_cells(interval: Interval, stage: Stage) -> list[str]:
    """mean, low, high; no interval under three seeds."""
    known = known_decimals(interval, alone=DECIMALS[stage])
    low, high = (interval.low, interval.high) if interval.enough else (None, None)
    return [rounded(interval.mean, known), rounded(low, known), rounded(high, known)]


def rounded(value: float | None, decimals: int) -> str:
    """A number to so many decimals, without "-0.00"; empty if there is none."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:z.{decimals}f}"


def as_data(row: Row) -> dict[str, Any]:
    """A row in full precision, for ``summary.json``."""
    return {
        "recipe": row.recipe,
        "arm": row.arm,
        "published": row.published.value if row.published else None,
        "published_source": row.published.source if row.published else None,
        "judged": interval_data(row.judged),
        "beside": interval_data(row.beside),
        "chance": row.chance,
        "skill": row.skill,
        "speech_skill": row.speech_skill,
        "wer": row.wer,
        "cer": row.cer,
        "blank_rate": row.blank_rate,
        "verdict": row.verdict,
        "caveat": row.caveat,
        "seeds_needed": row.needed,
    }


def interval_data(interval: Interval) -> dict[str, float | int | None]:
    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "seeds": interval.count,
        "mean": plain(interval.mean),
        "deviation": plain(interval.deviation),
        "low": plain(interval.low) if interval.enough else None,
        "high": plain(interval.high) if interval.enough else None,
    }


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
