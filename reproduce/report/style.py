"""How figures look: colours, markers and lines that also tell things apart in grey."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D

from reproduce.records import Stage
from reproduce.report.measured import codebooks_of, levels_of

Look = dict[str, Any]
"""Keywords of a matplotlib line."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9.5,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "svg.fonttype": "none",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "axes.facecolor": "none",
    "svg.hashsalt": "w2vrep",
}
# Okabe and Ito's colours, told apart by the colour-blind; their luminances differ too.
BLUE, GREEN, VERMILLION, PURPLE = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
GREY, BLACK, ORANGE = "#666666", "#000000", "#E69F00"
PAPER, GRID = "#ffffff", "#dddddd"
ON_THE_PAGE = {
    BLUE: "blue", GREEN: "green", VERMILLION: "vermillion", PURPLE: "purple", ORANGE: "orange",
    GREY: "grey", BLACK: "ink", PAPER: "paper", GRID: "grid",
}  # fmt: skip
"""Names of the page's colours, which are others in the dark."""
BY_CODEBOOKS = {2: (BLUE, "o"), 4: (GREEN, "^"), 8: (VERMILLION, "s"), 16: (PURPLE, "D")}
BY_LEVELS = {0: (GREY, "o"), 1: (BLUE, "v"), 2: (GREEN, "^"), 4: (VERMILLION, "s"),
             8: (PURPLE, "D"), 16: (ORANGE, "P")}  # fmt: skip
CHANCE_STYLE: Look = {"color": BLACK, "linestyle": (0, (1, 1.5)), "linewidth": 1.3}
LOGGED_STYLE: Look = CHANCE_STYLE | {"linestyle": (0, (4, 1.5, 1, 1.5, 1, 1.5))}
UNDER: Look = {"linewidth": 2.0, "markersize": 6.5}
"""Wide dashes and large hollow markers show beneath a thin line with the same values."""
SERIES: dict[str, tuple[str, Look]] = {
    "no_icsl": ("without ICSL", {"color": BLUE, "marker": "o", "linestyle": "--",
                                 "markerfacecolor": PAPER, **UNDER}),
    "icsl": ("with ICSL", {"color": VERMILLION, "marker": "s", "linestyle": "-"}),
    "icsl_sq": ("with squared ICSL", {"color": GREEN, "marker": "^", "linestyle": "-."}),
}  # fmt: skip
"""Arms over the number of codebooks: label and look by the name before it."""


def look_of(stage: Stage, arm: str, overrides: Mapping[str, Any]) -> Look:
    """Colour and marker by size; without ICSL or RVQ dashed, wide and hollow."""
    if stage == "pretrain":
        color, marker = BY_CODEBOOKS.get(codebooks_of(arm, overrides) or 0, (GREY, "v"))
        plain, other = arm.startswith("no_"), not re.fullmatch(r"(no_)?icsl_\d+cb", arm)
    else:
        levels = levels_of(arm, overrides)
        color, marker = BY_LEVELS.get(-1 if levels is None else levels, (GREY, "X"))
        plain, other = levels == 0, False
    line = "-." if other else "--" if plain else "-"
    return {
        "color": color,
        "marker": marker,
        "linestyle": line,
        "markerfacecolor": PAPER if plain else color,
        **(UNDER if plain else {}),
    }


def series_of(arm: str) -> tuple[str, Look]:
    """Label and look of the series over codebooks that an arm is a point of."""
    name = re.sub(r"_\d+cb$", "", arm)
    return SERIES.get(name, (name, {"color": GREY, "marker": "v", "linestyle": ":"}))


def handle(look: Look) -> Line2D:
    """A legend entry of a look."""
    return Line2D([], [], **look)
