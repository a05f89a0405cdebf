"""A table as LaTeX, as narrow as it goes: intervals in one cell, caveats as notes under it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

GROUP, NOTE = "recipe", "caveat"
"""The columns that become a heading over their rows, and notes under the table."""


def latex_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs tabular of a table with one row an arm.

    Columns without any cell are left out; ``low`` and ``high`` go into the cell of their mean. A
    ``recipe`` heads its rows; equal caveats share a letter.

    Args:
        columns: names; ``NAME_mean``, ``NAME_low`` and ``NAME_high`` belong together, so do
            ``mean``, ``low`` and ``high``.
        rows: cells as text, as many as columns.
    """
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    bounds = tuple(c for c in columns if c.endswith(("low", "high")))
    shown = [
        c
        for c in columns
        if c not in (GROUP, NOTE, *bounds) and any(record[c] for record in records)
    ]
    notes = list(dict.fromkeys(r[NOTE] for r in records if r.get(NOTE)))
    body: list[str] = []
    for number, (recipe, group) in enumerate(groupby(records, key=lambda r: r.get(GROUP, ""))):
        if number:
            body.append("\\midrule")
        if recipe:
            body.append(_wide(len(shown), f"\\textit{{{latex_escape(recipe)}}}"))
        for record in group:
            cells = [_minus(latex_escape(_cell(record, column))) for column in shown]
            if note := record.get(NOTE):
                cells[-1] += f"\\textsuperscript{{{_letter(notes.index(note))}}}"
            body.append(_line(cells))
    if notes:
        body.append("\\midrule")
    for number, note in enumerate(notes):
        text = f"\\textsuperscript{{{_letter(number)}}} {latex_escape(note)}"
        body.append(_wide(len(shown), f"\\footnotesize {text}"))
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{{''.join(_alignment(records, c) for c in shown)}}}",
            "\\toprule",
            _line([latex_escape(_heading(column, bounds)) for column in shown]),
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}\n",
        ]
    )


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }  # fmt: skip
    return "".join(special.get(c, c) for c in text)


def _cell(record: dict[str, str], column: str) -> str:
    stem = column.removesuffix("mean")
    low = record.get(f"{stem}low") if column.endswith("mean") else None
    return f"{record[column]} [{low}, {record[f'{stem}high']}]" if low else record[column]


def _minus(text: str) -> str:
    """Minus signs instead of hyphens before digits."""
    return re.sub(r"(?<![\w}])-(?=\d)", "$-$", text)


def _heading(column: str, bounds: Sequence[str]) -> str:
    merged = f"{column.removesuffix('mean')}low" in bounds
    stem = column.removesuffix("_mean") if merged else column
    words = {"wer": "WER", "cer": "CER", "icsl": "ICSL", "rvq": "RVQ"}
    return " ".join(words.get(word, word) for word in stem.split("_"))


def _alignment(records: Sequence[dict[str, str]], column: str) -> str:
    """Numbers without an interval flush right."""
    return "r" if all(_is_number(_cell(record, column)) for record in records) else "l"


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _wide(columns: int, text: str) -> str:
    return f"\\multicolumn{{{columns}}}{{l}}{{{text}}} \\\\"


def _letter(number: int) -> str:
    """a to z, then aa, ab and so on."""
    return ("" if number < 26 else _letter(number // 26 - 1)) + chr(ord("a") + number % 26)
