"""Tables as LaTeX: what is merged, left out and noted."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reproduce.report.latex import latex_escape, latex_table

COLUMNS = (
    "recipe", "arm", "icsl", "published", "train_mean", "train_low", "train_high", "skill", "wer",
    "verdict", "caveat",
)  # fmt: skip
ROWS = [
    ["a_1", "no_rvq", "", "4.12", "4.6", "-4.0", "13.2", "", "1.01", "inconclusive", "WER 1 & up"],
    ["a_1", "rvq_1", "", "", "4.8", "", "", "", "0.9", "too few seeds", ""],
    ["b", "no_rvq", "", "4.12", "4.7", "4.5", "4.9", "", "1.01", "differs", "WER 1 & up"],
    [
        "b",
        "rvq_1",
        "",
        "4.59",
        "4.6",
        "4.5",
        "4.7",
        "",
        "1.01",
        "reproduced",
        "1 of 3 without text",
    ],
]


def test_a_table_for_print() -> None:
    assert latex_table(COLUMNS, ROWS).splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lrlrl}",
        r"\toprule",
        r"arm & published & train & WER & verdict \\",
        r"\midrule",
        r"\multicolumn{5}{l}{\textit{a\_1}} \\",
        r"no\_rvq & 4.12 & 4.6 [$-$4.0, 13.2] & 1.01 & inconclusive\textsuperscript{a} \\",
        r"rvq\_1 &  & 4.8 & 0.9 & too few seeds \\",
        r"\midrule",
        r"\multicolumn{5}{l}{\textit{b}} \\",
        r"no\_rvq & 4.12 & 4.7 [4.5, 4.9] & 1.01 & differs\textsuperscript{a} \\",
        r"rvq\_1 & 4.59 & 4.6 [4.5, 4.7] & 1.01 & reproduced\textsuperscript{b} \\",
        r"\midrule",
        r"\multicolumn{5}{l}{\footnotesize \textsuperscript{a} WER 1 \& up} \\",
        r"\multicolumn{5}{l}{\footnotesize \textsuperscript{b} 1 of 3 without text} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_more_notes_than_letters() -> None:
    rows = [[str(k), f"note {k}"] for k in range(30)]
    text = latex_table(("arm", "caveat"), rows)
    assert re.findall(r"\{(\w+)\} note", text)[24:29] == ["y", "z", "aa", "ab", "ac"]


def test_escaped() -> None:
    assert latex_escape("a_b & 5 % \\ {x}") == r"a\_b \& 5 \% \textbackslash{} \{x\}"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_takes_it(tmp_path: Path) -> None:
    table = latex_table(COLUMNS, ROWS)
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\noindent\n"
        + table
        + "\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
