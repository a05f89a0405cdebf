"""A work folder's runs, curves, tables and claims as pandas frames."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from reproduce.recipe import load_recipe
from reproduce.report import tables
from reproduce.report.claims import judge
from reproduce.report.measured import STAGES, read_work
from reproduce.report.published import load_published
from reproduce.report.scale import scale_of


@dataclass(frozen=True)
class Frames:
    """What a report shows of one work folder.

    Attributes:
        runs: a row a run: ``stage, arm, seed, status, outcome, counted`` and the last value of
            every metrics column as ``train_COLUMN`` and ``valid_COLUMN``.
        curves: every row of every ``metrics.csv``, with ``stage, arm, seed`` before it.
        pretrain, finetune, claims: the tables as written to CSV.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    pretrain: pd.DataFrame
    finetune: pd.DataFrame
    claims: pd.DataFrame


def load(work: str | Path) -> Frames:
    """Read a work folder, or the runs kept beside a page (``results/NAME/runs``).

    Raises:
        DataError: no such folder, or its recipe can't be read.
    """
    found = read_work(Path(work))
    published = load_published()
    runs, curves = [], []
    for (stage, arm, seed), run in found.runs.items():
        who = {"stage": stage, "arm": arm, "seed": seed}
        last = {
            f"{split}_{column}": run.final(split, column)
            for split, columns in run.metrics.items()
            for column in columns
            if column != "update"
        }
        state = {"status": run.status, "outcome": run.outcome, "counted": run.counted}
        runs.append(who | state | last)
        for split, columns in run.metrics.items():
            curves.append(pd.DataFrame(who | {"split": split} | columns))
    claims = judge(published, found, scale_of(published, found, load_recipe("as-run").model_dump()))
    rows = {stage: tables.rows(published, stage, [found]) for stage in STAGES}
    return Frames(
        pd.DataFrame(runs),
        pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(),
        _frame(tables.pretrain_table(rows["pretrain"])),
        _frame(tables.finetune_table(rows["finetune"])),
        _frame(tables.claims_table(claims)),
    )


def _frame(table: tables.Table) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.csv()))
