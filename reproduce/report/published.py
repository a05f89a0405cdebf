"""The published side: tables, curves, claims and protocols, read from ``results/published/data``.

Every row there carries its source and how exactly it is known.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import numpy as np

from reproduce.errors import W2vrepError
from reproduce.records import Stage
from reproduce.report.codes import Codes
from reproduce.report.measured import LOSS
from reproduce.report.statistics import Curve, table_margin
from reproduce.shipped import shipped

NEGATIVES = 100
CHANCE = math.log(1 + NEGATIVES)
"""nats: contrastive loss of a model that knows nothing, if no negative is removed: ln(101)."""

PRINTED_SPLIT: dict[Stage, str] = {"pretrain": "valid", "finetune": "train"}
"""What the study's printed losses are of: of fine-tuning, the last training window."""

Measure = Literal[
    "final", "final_of_two", "slope", "area", "updates_to_reach", "roughness", "spread",
    "error_for_bits",
]  # fmt: skip
Expected = Literal["below", "above", "within", "not above"]


@dataclass(frozen=True)
class PublishedNumber:
    """One published loss, in nats, known to ``plus_minus``."""

    stage: Stage
    arm: str
    value: float
    plus_minus: float
    decimals: int
    source: str
    tabled: bool

    @property
    def text(self) -> str:
        """As printed, but no digits finer than it is known to (of 4.61175 ± 0.0001: 4.6117)."""
        return f"{self.value:.{min(self.decimals, math.floor(-math.log10(self.plus_minus)))}f}"


@dataclass(frozen=True)
class ClaimPart:
    """One test of a claim: a quantity of some arms, and where it should be.

    ``expected``: below or above 0, within the table's margin around it, or not above that margin.
    ``column``: of ``metrics.csv``, what is measured.
    """

    number: int
    stage: Stage
    measure: Measure
    column: str
    split: str
    arms: tuple[str, ...]
    expected: Expected
    quantity: str


@dataclass(frozen=True)
class Claim:
    """A statement of the study and the tests it stands or falls with; ``note`` explains those."""

    name: str
    statement: str
    source: str
    note: str
    parts: tuple[ClaimPart, ...]


@dataclass(frozen=True)
class Published:
    """Everything published. As a source of claims it is one "seed", number 0, without spread."""

    numbers: dict[tuple[Stage, str], PublishedNumber]
    by_codebooks: dict[str, PublishedNumber]
    curves: dict[tuple[Stage, str, str], Curve]
    word_error_rates: dict[str, float]
    """Last logged on validation, by fine-tuning arm."""
    icsl_logged: dict[str, tuple[float, float]]
    """First and last value in the run logs, by pretraining arm: mean cosine between codebooks."""
    claims: tuple[Claim, ...]
    configuration: tuple[dict[str, str], ...]
    margins: dict[Stage, float]

    @property
    def chance_gap(self) -> float:
        """The largest distance of a published pretraining loss from chance, in nats."""
        return max(abs(n.value - CHANCE) for (of, _), n in self.numbers.items() if of == "pretrain")

    def arms(self, stage: Stage) -> list[str]:
        """Arms with a published number, in the order of the tables."""
        return [arm for (of, arm) in self.numbers if of == stage]

    def curve_arms(self, stage: Stage, split: str) -> list[str]:
        return [arm for (of, on, arm) in self.curves if (of, on) == (stage, split)]

    def seeds(self, stage: Stage, arm: str) -> set[int]:
        return {0}

    def final(
        self,
        stage: Stage,
        split: str,
        arm: str,
        seed: int,
        column: str = "",
        *,
        series: bool = False,
    ) -> float | None:
        """The published loss, which is of ``PRINTED_SPLIT`` whatever the split asked for.

        ``series``: from one figure over codebooks, not from the table. Of other columns than the
        loss no last values were published by arm.
        """
        if column not in ("", LOSS[stage]):
            return None
        if series and arm in self.by_codebooks:
            return self.by_codebooks[arm].value
        number = self.numbers.get((stage, arm))
        return number.value if number else None

    def curve(self, stage: Stage, split: str, arm: str, seed: int) -> Curve | None:
        return self.curves.get((stage, split, arm))

    def codes(self, stage: Stage, arm: str, seed: int) -> Codes:
        """Nothing was published of them."""
        return Codes()


@cache
def load_published() -> Published:
    """Read the published data shipped with the package.

    Raises:
        W2vrepError: a file is missing.
    """
    table1, table2 = _rows("table1_pretrain"), _rows("table2_finetune")
    figure4, log = _rows("fig4_pretrain_codebooks"), _rows("log_finetune")

    by_codebooks = {r["arm"]: _number("pretrain", r, "contrastive_loss", False) for r in figure4}
    tabled = {r["arm"]: _number("pretrain", r, "contrastive_loss", True) for r in table1}
    last = [r for r in log if (r["arm"], r["split"]) == ("no_rvq", "train")][-1]
    numbers: dict[tuple[Stage, str], PublishedNumber] = {}
    for arm, number in by_codebooks.items():
        numbers["pretrain", arm] = tabled.get(arm, number)
    numbers["finetune", "no_rvq"] = _number("finetune", last, "ctc", False)
    for row in table2:
        numbers["finetune", row["arm"]] = _number("finetune", row, "ctc_loss", True)

    curves: dict[tuple[Stage, str, str], Curve] = {}
    for split in ("train", "valid"):
        figure = _rows({"train": "fig2_pretrain_train", "valid": "fig3_pretrain_valid"}[split])
        for arm, curve in _curves(figure, "contrastive_loss").items():
            curves["pretrain", split, arm] = curve
        logged = [r for r in log if r["split"] == split]
        for arm, curve in sorted(_curves(logged, "ctc").items()):
            curves["finetune", split, arm] = curve

    tests: dict[str, list[ClaimPart]] = defaultdict(list)
    for r in _rows("claim_tests"):
        part = ClaimPart(
            number=int(r["part"]),
            stage=cast(Stage, r["stage"]),
            measure=cast(Measure, r["measure"]),
            column=r["column"],
            split=r["split"],
            arms=tuple(r["arms"].split()),
            expected=cast(Expected, r["expected"]),
            quantity=r["quantity"],
        )
        tests[r["claim"]].append(part)
    return Published(
        numbers=numbers,
        by_codebooks=by_codebooks,
        curves=curves,
        word_error_rates={
            r["arm"]: float(r["wer"]) for r in log if r["split"] == "valid" and r["wer"]
        },
        icsl_logged={
            arm: (float(curve.values[0]), float(curve.values[-1]))
            for arm, curve in _curves(
                [r for r in _rows("log_pretrain") if r["icsl"]], "icsl"
            ).items()
        },
        claims=tuple(
            Claim(r["claim"], r["statement"], r["source"], r["note"], tuple(tests[r["claim"]]))
            for r in _rows("claims")
        ),
        configuration=tuple(_rows("configuration")),
        margins={
            "pretrain": table_margin([n.value for n in tabled.values()]),
            "finetune": table_margin([float(r["ctc_loss"]) for r in table2]),
        },
    )


def _rows(name: str) -> list[dict[str, str]]:
    path: Path = shipped("results", "published", "data", f"{name}.csv")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise W2vrepError(
            f"published data missing: {error.strerror}",
            where=f"results/published/data/{name}.csv",
            do="install the package again",
        ) from None


def _number(stage: Stage, row: dict[str, str], column: str, tabled: bool) -> PublishedNumber:
    text = row[column]
    decimals = len(text.partition(".")[2])
    source = row["source"] if tabled or row["source"] != "run log" else "run log, last window"
    return PublishedNumber(
        stage, row["arm"], float(text), float(row["plus_minus"]), decimals, source, tabled
    )


def _curves(rows: list[dict[str, str]], column: str) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        points[row["arm"]].append((float(row["update"]), float(row[column])))
    return {arm: Curve(*np.array(xy, dtype=np.float64).T) for arm, xy in points.items()}
