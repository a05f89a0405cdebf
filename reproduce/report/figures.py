"""Figures 2 to 7 in the paper's layout: the published panel first, then one a recipe.

Colour and marker say codebooks or levels, line style says ICSL, so that nothing hangs on colour
alone. Bands and whiskers are the range over seeds. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from reproduce.records import Stage
from reproduce.report.measured import LOSS, Work, codebooks_of, levels_of
from reproduce.report.published import CHANCE, Published
from reproduce.report.statistics import Curve, Floats, mean_and_range

Look = dict[str, Any]
"""Keywords of a matplotlib line."""

DPI = 110
PANEL = (4.3, 3.3)
LOG_FROM = 3.0
"""A loss axis is logarithmic if its largest value is this many times the smallest."""
ROUGHLY_EQUAL = 2.0
"""Panels share their loss axis if that makes it at most this many times the published one."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9.5,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "w2vrep",
}
# Okabe and Ito's colours, told apart by the colour-blind; their luminances differ too.
BLUE, GREEN, VERMILLION, PURPLE = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
GREY, BLACK, ORANGE = "#666666", "#000000", "#E69F00"
BY_CODEBOOKS = {2: (BLUE, "o"), 4: (GREEN, "^"), 8: (VERMILLION, "s"), 16: (PURPLE, "D")}
BY_LEVELS = {0: (GREY, "o"), 1: (BLUE, "v"), 2: (GREEN, "^"), 4: (VERMILLION, "s"),
             8: (PURPLE, "D"), 16: (ORANGE, "P")}  # fmt: skip
CHANCE_STYLE: Look = {"color": BLACK, "linestyle": (0, (1, 1.5)), "linewidth": 1.3}
LOGGED_STYLE: Look = CHANCE_STYLE | {"linestyle": (0, (4, 1.5, 1, 1.5, 1, 1.5))}

UNITS: dict[Stage, str] = {
    "pretrain": "contrastive loss (nats per masked frame)",
    "finetune": "CTC loss (nats per target token)",
}


@dataclass(frozen=True)
class Drawn:
    """A finished figure: file name without suffix, what it shows, and its PNG."""

    name: str
    title: str
    caption: str
    png: bytes


@dataclass
class Panel:
    """What one panel holds while it is drawn: y values for its limits, and its legend."""

    axes: Axes
    heights: list[float]
    legend: dict[str, Line2D | Patch]

    def seen(self, values: Floats | Sequence[float]) -> None:
        self.heights.extend(float(v) for v in (np.min(values), np.max(values)) if np.isfinite(v))


def draw_all(published: Published, works: Sequence[Work], out: Path) -> list[Drawn]:
    """Write figures 2 to 7 as PNG and PDF under ``out``."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, title, caption, stage, draw in _plans(published):
            figure = _figure(works, stage, draw)
            png = _save(figure, out / name)
            drawn.append(Drawn(name, title, caption, png))
    return drawn


DrawPanel = Callable[[Panel, Work | None], None]


def _plans(published: Published) -> Iterator[tuple[str, str, str, Stage, DrawPanel]]:
    """name, title, caption, stage and drawing of each figure."""

    def curves(stage: Stage, split: str) -> DrawPanel:
        return lambda panel, work: _curves(panel, published, work, stage, split)

    seeds = "Line: mean over seeds; band: their range."
    yield (
        "fig2_pretrain_train", "Figure 2. Contrastive loss in training",
        f"{seeds} The published axis shows the updates that the logs give (10 to 724), not the "
        "steps as plotted (0 to 2125).",
        "pretrain", curves("pretrain", "train"),
    )  # fmt: skip
    yield (
        "fig3_pretrain_valid", "Figure 3. Contrastive loss in validation",
        f"{seeds} Chance is ln(1 + kept negatives); measured panels show it as logged.",
        "pretrain", curves("pretrain", "valid"),
    )  # fmt: skip
    yield (
        "fig4_codebooks", "Figure 4. Final contrastive loss against the number of codebooks",
        "Validation loss at the end. Points: means over seeds; whiskers: their range.",
        "pretrain", lambda panel, work: _against_codebooks(panel, published, work),
    )  # fmt: skip
    yield (
        "fig5_finetune_train", "Figure 5. CTC loss in training, with and without RVQ",
        f"{seeds} The study's number is the last point of this curve.",
        "finetune", curves("finetune", "train"),
    )  # fmt: skip
    yield (
        "fig6_finetune_valid", "Figure 6. CTC loss in validation, with and without RVQ", seeds,
        "finetune", curves("finetune", "valid"),
    )  # fmt: skip
    yield (
        "fig7_rvq_levels", "Figure 7. Final CTC loss against RVQ levels",
        "The published values are means of the last training window; measured panels show that and "
        "the validation loss. Whiskers: range over seeds.",
        "finetune", lambda panel, work: _against_levels(panel, published, work),
    )  # fmt: skip


def _figure(works: Sequence[Work], stage: Stage, draw: DrawPanel) -> Figure:
    sources: list[Work | None] = [None, *works]
    columns = min(len(sources), 3) if len(sources) != 4 else 2
    lines = -(-len(sources) // columns)
    width = PANEL[0] * columns if len(sources) > 1 else 6.0
    figure = Figure(figsize=(width, PANEL[1] * lines + 0.55), dpi=DPI, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    panels = []
    for axes, source in zip(grid, sources):
        panel = Panel(axes, [], {})
        draw(panel, source)
        axes.set_title("published" if source is None else f"measured: {source.name}")
        if not panel.heights:
            _empty(axes)
        panels.append(panel)
    for axes in grid[len(sources) :]:
        axes.set_visible(False)
    _limits(panels)
    for axes in grid[::columns]:
        axes.set_ylabel(UNITS[stage])
    legend: dict[str, Line2D | Patch] = {}
    for panel in panels:
        legend |= {label: item for label, item in panel.legend.items() if label not in legend}
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=min(len(legend), 2 * columns),
    )
    return figure


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _limits(panels: Sequence[Panel]) -> None:
    """One loss axis for all panels if they are alike, else one each; logarithmic if it is wide."""
    filled = [panel for panel in panels if panel.heights]
    both = [height for panel in filled for height in panel.heights]
    first = np.ptp(filled[0].heights) if filled else 0.0
    shared = np.ptp(both) <= ROUGHLY_EQUAL * first if both else False
    for panel in filled:
        heights = both if shared else panel.heights
        low, high = min(heights), max(heights)
        axis = panel.axes
        if low > 0 and high > LOG_FROM * low:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.08, high * 1.08)
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            room = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
            axis.set_ylim(low - room, high + room)
            axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _save(figure: Figure, path: Path) -> bytes:
    if engine := figure.get_layout_engine():
        engine.execute(figure)  # once, for both formats: it costs more than drawing
        figure.set_layout_engine(None)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    path.with_suffix(".png").write_bytes(image.getvalue())
    figure.savefig(
        path.with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None, "Creator": None}
    )
    return image.getvalue()


# ------------------------------------------------------------------------------- curves, 2 3 5 6


def _curves(
    panel: Panel, published: Published, work: Work | None, stage: Stage, split: str
) -> None:
    paper = published.curve_arms(stage, split)
    panel.axes.set_xlabel("update")
    if work is None:
        for arm in paper:
            curve = published.curves[stage, split, arm]
            _line(panel, stage, arm, {}, [curve], paper.index(arm))
        if stage == "pretrain":
            _chance_line(panel)
        return
    measured = [arm for arm in work.arms(stage) if _read(work, stage, arm, split)]
    arms = [arm for arm in paper if arm in measured] or measured
    for place, arm in enumerate(arms):
        done = [run.curve(split, LOSS[stage]) for run in work.counted(stage, arm)]
        overrides = work.overrides(stage, arm)
        _line(panel, stage, arm, overrides, [c for c in done if len(c)], place)
        for run in work.of(stage, arm):
            if not run.counted and len(curve := run.curve(split, LOSS[stage])):
                _unfinished(panel, stage, arm, overrides, curve)
    if stage == "pretrain":
        chance = [
            run.curve(split, "chance_loss") for arm in arms for run in work.counted(stage, arm)
        ]
        if chance := [curve for curve in chance if len(curve)]:
            updates, mean, low, high = mean_and_range(chance)
            (line,) = panel.axes.plot(updates, mean, **LOGGED_STYLE, zorder=1.5)
            if len(updates) == 1:
                line.set_marker("_")
            panel.axes.fill_between(updates, low, high, color=GREY, alpha=0.15, linewidth=0)
            panel.legend["chance as logged"] = _handle(LOGGED_STYLE)
            panel.seen(mean)


def _read(work: Work, stage: Stage, arm: str, split: str) -> bool:
    return any(len(run.curve(split, LOSS[stage])) for run in work.of(stage, arm))


def _line(
    panel: Panel,
    stage: Stage,
    arm: str,
    overrides: Mapping[str, Any],
    curves: Sequence[Curve],
    place: int,
) -> None:
    if not curves:
        return
    look = _look(stage, arm, overrides)
    updates, mean, low, high = mean_and_range(curves)
    every = max(1, len(updates) // 7)
    panel.axes.plot(updates, mean, **look, markevery=(place * every // 4, every))
    panel.seen(mean)
    panel.legend[arm] = _handle(look)
    if len(curves) > 1:
        panel.axes.fill_between(updates, low, high, color=look["color"], alpha=0.18, linewidth=0)
        panel.legend["range over seeds"] = Patch(facecolor=GREY, alpha=0.3)
        panel.seen(low)
        panel.seen(high)


def _unfinished(
    panel: Panel, stage: Stage, arm: str, overrides: Mapping[str, Any], curve: Curve
) -> None:
    color = _look(stage, arm, overrides)["color"]
    style = {"color": color, "linestyle": ":", "linewidth": 0.9}
    panel.axes.plot(curve.updates, curve.values, **style)
    panel.axes.plot(curve.updates[-1:], curve.values[-1:], "x", color=color)
    panel.legend["unfinished or failed run"] = Line2D(
        [], [], color=GREY, linestyle=":", linewidth=0.9, marker="x"
    )
    panel.seen(curve.values)


def _chance_line(panel: Panel) -> None:
    panel.axes.axhline(CHANCE, **CHANCE_STYLE, zorder=1.5)
    panel.legend["chance ln(101) = 4.6151"] = _handle(CHANCE_STYLE)
    panel.seen([CHANCE])


# ------------------------------------------------------------------------------- against size, 4 7


def _against_codebooks(panel: Panel, published: Published, work: Work | None) -> None:
    series: dict[str, dict[int, list[float]]] = {}
    chance: dict[int, list[float]] = {}
    arms = list(published.by_codebooks) if work is None else work.arms("pretrain")
    for arm in arms:
        overrides = work.overrides("pretrain", arm) if work else {}
        size = codebooks_of(arm, overrides)
        losses = (
            work.values("pretrain", arm, "valid", LOSS["pretrain"])
            if work
            else [published.by_codebooks[arm].value]
        )
        if size is None or not losses:
            continue
        series.setdefault(re.sub(r"_\d+cb$", "", arm), {})[size] = losses
        if work:
            chance.setdefault(size, []).extend(work.values("pretrain", arm, "valid", "chance_loss"))
    looks = {"no_icsl": (BLUE, "o", "--", "white"), "icsl": (VERMILLION, "s", "-", VERMILLION)}
    labels = {"no_icsl": "without ICSL", "icsl": "with ICSL"}
    for place, (name, points) in enumerate(series.items()):
        color, marker, dashes, fill = looks.get(name, (GREEN, "^", "-.", "white"))
        style = {"color": color, "marker": marker, "linestyle": dashes, "markerfacecolor": fill}
        _points(panel, points, labels.get(name, name), style, 1 + 0.04 * (place if work else 0))
    if work is None:
        _chance_line(panel)
    elif chance := {size: values for size, values in chance.items() if values}:
        sizes = sorted(chance)
        means = [float(np.mean(chance[size])) for size in sizes]
        (line,) = panel.axes.plot(sizes, means, **LOGGED_STYLE, zorder=1.5)
        if len(sizes) == 1:
            line.set_marker("_")
        panel.legend["chance as logged"] = _handle(LOGGED_STYLE)
        panel.seen(means)
    _doubling_axis(panel.axes, [size for points in series.values() for size in points], "codebooks")


def _against_levels(panel: Panel, published: Published, work: Work | None) -> None:
    arms = published.arms("finetune") if work is None else work.arms("finetune")
    filled = {"marker": "s", "linestyle": "-", "color": VERMILLION}
    hollow = {"marker": "o", "linestyle": "--", "color": BLUE, "markerfacecolor": "white"}
    plans = [("train", "last training window", filled)]
    if work is not None:
        plans.append(("valid", "validation", hollow))
    sizes: list[int] = []
    for split, label, style in plans:
        points: dict[int, list[float]] = {}
        for arm in arms:
            size = levels_of(arm, work.overrides("finetune", arm) if work else {})
            losses = (
                work.values("finetune", arm, split, LOSS["finetune"])
                if work
                else [published.numbers["finetune", arm].value]
            )
            if size is not None and losses:
                points[size] = losses
        reference = points.pop(0, None)
        _points(panel, points, label, style)
        if reference:
            look: Look = {
                "color": style["color"],
                "linewidth": 1.2,
                "linestyle": (0, (4, 1.5, 1, 1.5)),
            }
            panel.axes.axhline(float(np.mean(reference)), **look, zorder=1.5)
            panel.legend[f"no RVQ, {label}"] = _handle(look)
            panel.seen([float(np.mean(reference))])
        sizes += points
    _doubling_axis(panel.axes, sizes, "RVQ levels")


def _points(
    panel: Panel, points: dict[int, list[float]], label: str, style: Look, aside: float = 1.0
) -> None:
    """A series with whiskers, its sizes times ``aside`` so that whiskers don't hide each other."""
    if not points:
        return
    sizes = sorted(points)
    means = np.array([np.mean(points[size]) for size in sizes])
    # the mean of equal values may lie outside them by a rounding error
    down = np.maximum(means - [np.min(points[size]) for size in sizes], 0)
    up = np.maximum([np.max(points[size]) for size in sizes] - means, 0)
    panel.axes.errorbar(
        np.array(sizes) * aside, means, yerr=[down, up], capsize=3, elinewidth=1, **style
    )
    panel.legend[label] = _handle(style)
    panel.seen(means - down)
    panel.seen(means + up)


def _doubling_axis(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xlabel(label)
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(sizes)), labels=[str(size) for size in sorted(set(sizes))])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)


# ------------------------------------------------------------------------------------------ looks


def _look(stage: Stage, arm: str, overrides: Mapping[str, Any]) -> Look:
    """Colour and marker by size; without ICSL or RVQ dashed and hollow."""
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
        "markerfacecolor": "white" if plain else color,
    }


def _handle(style: Look) -> Line2D:
    return Line2D([], [], **style)
