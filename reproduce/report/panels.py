"""What figures 2 to 7 show in one panel: the published data or the runs of one recipe.

Every run is there: a thin line under the mean of its arm, or a small mark beside it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from reproduce.records import Stage
from reproduce.report.measured import LOSS, Work, arms_of_a_series, codebooks_of, levels_of
from reproduce.report.published import CHANCE, Published
from reproduce.report.statistics import Curve, Floats, mean_and_range
from reproduce.report.style import (
    BLUE,
    CHANCE_STYLE,
    GREY,
    LOGGED_STYLE,
    PAPER,
    VERMILLION,
    Look,
    look_of,
    series_of,
)

UNFINISHED, LEAVES = "unfinished or failed run", "where it leaves the axis"
THIN: Look = {"linewidth": 0.7, "alpha": 0.5, "zorder": 1.7}
"""A seed under the mean of its arm."""
SMALL: Look = {"linestyle": "", "markersize": 3.2, "alpha": 0.6, "zorder": 1.8}
ASIDE = 1.06
"""Factor between the places of two series at the same number of codebooks, so that none hides."""
MOST_POINTS = 40
"""Points of a curve that say their values where they are pointed at."""
KEY = (1.035, 1.065, 1.095)
"""Where a label's own line and mark lie, in shares of the axes; its words follow."""
LETTERS = 15
"""Of a label a line."""
LINE = 10.5
"""Height of a line of a label, in points."""


@dataclass
class Panel:
    """What one panel holds while it is drawn: y values for its limits, labels, points and legend.

    Unfinished and failed runs don't set the limits: a loss on its way to infinity would press
    everything else flat. Their curves are kept to be marked where they leave the axis.

    ``ends``: where a line ends (x, y), what it is and how it looks, to be named there. ``points``:
    x, y and what is said of it where it is pointed at. ``several``: something is of several seeds.
    """

    axes: Axes
    heights: list[float] = field(default_factory=list)
    unfinished: list[tuple[Curve, str]] = field(default_factory=list)
    legend: dict[str, Line2D] = field(default_factory=dict)
    ends: dict[str, tuple[float, float, Look]] = field(default_factory=dict)
    points: list[tuple[float, float, str]] = field(default_factory=list)
    several: bool = False

    @property
    def empty(self) -> bool:
        return not (self.heights or self.unfinished)

    def point_along(self, curve: Curve, what: str, *, over: str = "update") -> None:
        """Points of a curve, evenly taken if it has many."""
        count = len(curve)
        places = np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int)
        who = ", ".join(filter(None, (what, curve.name)))
        self.points += [
            (float(x), float(y), f"{who}, {over} {x:g}: {y:.5g}")
            for x, y in zip(curve.updates[places], curve.values[places])
        ]

    def points_inside(self) -> list[tuple[float, float, str]]:
        """Those that the axes show, their limits being set."""
        (left, right), (low, high) = self.axes.get_xlim(), self.axes.get_ylim()
        return [p for p in self.points if left <= p[0] <= right and low <= p[1] <= high]

    def name_ends(self, high: float) -> None:
        """Names beside the ends of lines, moved apart where those meet; the limits being set.

        Args:
            high: of the axes, in points.
        """
        axes, to_share = self.axes, self.axes.transData + self.axes.transAxes.inverted()
        ends = sorted(self.ends.items(), key=lambda end: end[1][1], reverse=True)
        names = [wrapped(name) for name, _ in ends]
        wanted = [float(to_share.transform((x, y))[1]) for _, (x, y, _) in ends]
        sizes = [LINE * (name.count("\n") + 1) / high for name in names]
        for name, place, (_, (x, y, look)) in zip(names, apart(wanted, sizes), ends):
            axes.annotate(
                "", (x, y), (KEY[0] - 0.01, place), textcoords="axes fraction",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": look["color"],
                            "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
            key: Look = {"transform": axes.transAxes, "clip_on": False, "markevery": [1]}
            axes.plot(KEY, [place] * len(KEY), **look, **key)
            axes.text(
                KEY[-1] + 0.02, place, name, transform=axes.transAxes, va="center", fontsize=8.5,
                linespacing=1.0,
            )  # fmt: skip

    def seen(self, values: Floats | Sequence[float]) -> None:
        self.heights.extend(float(v) for v in (np.min(values), np.max(values)) if np.isfinite(v))

    def settle(self) -> None:
        """Where there are unfinished runs alone: limits from their lowest loss to their first."""
        if not self.heights:
            for curve, _ in self.unfinished:
                self.seen([curve.values[0], curve.values.min()])

    def mark_leaving(self) -> None:
        """A triangle where an unfinished run crosses the edge of the axis, its limits being set."""
        scale = np.log if self.axes.get_yscale() == "log" else np.asarray
        low, high = self.axes.get_ylim()
        for curve, color in self.unfinished:
            for edge, side, marker in ((high, 1, "^"), (low, -1, "v")):
                outside = np.flatnonzero(side * curve.values > side * edge)
                if not len(outside):
                    continue
                ends = slice(max(outside[0] - 1, 0), outside[0] + 1)
                order = slice(None, None, side)  # np.interp wants rising values
                heights, updates = curve.values[ends][order], curve.updates[ends][order]
                at = np.interp(scale(edge), scale(heights), updates)
                self.axes.plot(
                    [at], [edge], color=color, marker=marker, markersize=7, clip_on=False, zorder=3
                )
                self.legend[LEAVES] = Line2D(
                    [], [], color=GREY, marker="^", markersize=7, linestyle=""
                )


def wrapped(name: str) -> str:
    """A label in lines of at most ``LETTERS`` letters."""
    return "\n".join(textwrap.wrap(name, LETTERS, break_long_words=False))


def apart(wanted: Sequence[float], sizes: Sequence[float]) -> Floats:
    """Places as near as can be to those wanted, none over its neighbour, within the axes if there
    is room.

    Args:
        wanted: falling, in shares of the axes' height.
        sizes: heights, in the same unit.

    Returns:
        Centres, in the same order.
    """
    from scipy.optimize import isotonic_regression  # takes a while to import

    if not len(wanted):
        return np.empty(0)
    tall = np.asarray(sizes, np.float64)
    below = np.cumsum(tall) - tall / 2  # each centre under the top of a stack without gaps
    free = isotonic_regression(np.asarray(wanted) + below, increasing=False).x
    lowest, highest = tall.sum(), 1.0
    return np.asarray(np.clip(free, min(lowest, highest), max(lowest, highest)) - below)


# ------------------------------------------------------------------------------- curves, 2 3 5 6


def draw_curves(
    panel: Panel, published: Published, work: Work | None, stage: Stage, split: str
) -> None:
    paper = published.curve_arms(stage, split)
    panel.axes.set_xlabel("update")
    panel.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if work is None:
        for arm in paper:
            curve = published.curves[stage, split, arm]
            draw_line(panel, stage, arm, {}, [curve], paper.index(arm))
        if stage == "pretrain":
            _chance_line(panel)
        return
    measured = [arm for arm in work.arms(stage) if _read(work, stage, arm, split)]
    arms = [arm for arm in paper if arm in measured] or measured
    for place, arm in enumerate(arms):
        done = [run.curve(split, LOSS[stage]) for run in work.counted(stage, arm)]
        overrides = work.overrides(stage, arm)
        draw_line(panel, stage, arm, overrides, [c for c in done if len(c)], place)
        for run in work.of(stage, arm):
            if not run.counted and len(curve := run.curve(split, LOSS[stage])):
                _unfinished(panel, stage, arm, overrides, curve)
    if stage == "pretrain":
        chance = [
            run.curve(split, "chance_loss") for arm in arms for run in work.counted(stage, arm)
        ]
        if chance := [curve for curve in chance if len(curve)]:
            updates, mean, low, high = mean_and_range(chance)
            _logged_chance(panel, updates, mean)
            panel.axes.fill_between(updates, low, high, color=GREY, alpha=0.15, linewidth=0)


def _read(work: Work, stage: Stage, arm: str, split: str) -> bool:
    return any(len(run.curve(split, LOSS[stage])) for run in work.of(stage, arm))


def draw_line(
    panel: Panel,
    stage: Stage,
    arm: str,
    overrides: Mapping[str, Any],
    curves: Sequence[Curve],
    place: int,
    *,
    over: str = "update",
    **more: Any,
) -> None:
    """An arm's curves, thin, and their mean; ``more`` changes its look."""
    if not curves:
        return
    look = look_of(stage, arm, overrides) | more
    updates, mean, _, _ = mean_and_range(curves)
    every = max(1, len(updates) // 7)
    order = 2.0 if look["markerfacecolor"] == PAPER else 2.1  # wide and hollow beneath
    panel.axes.plot(updates, mean, **look, zorder=order, markevery=(place * every // 4, every))
    panel.seen(mean)
    panel.ends[arm] = (float(updates[-1]), float(mean[-1]), look)
    for curve in curves:
        panel.point_along(curve, arm, over=over)
    if len(curves) > 1:
        panel.several = True
        for curve in curves:
            thin = {"color": look["color"], "linestyle": look["linestyle"], **THIN}
            panel.axes.plot(curve.updates, curve.values, **thin)
            panel.seen(curve.values)


def _unfinished(
    panel: Panel, stage: Stage, arm: str, overrides: Mapping[str, Any], curve: Curve
) -> None:
    color = look_of(stage, arm, overrides)["color"]
    style = {"color": color, "linestyle": ":", "linewidth": 0.9}
    panel.axes.plot(curve.updates, curve.values, **style)
    panel.axes.plot(curve.updates[-1:], curve.values[-1:], "x", color=color)
    panel.legend[UNFINISHED] = Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, marker="x")
    panel.unfinished.append((curve, color))
    panel.point_along(curve, f"{arm}, unfinished or failed")


def _chance_line(panel: Panel) -> None:
    panel.axes.axhline(CHANCE, **CHANCE_STYLE, zorder=1.5)
    panel.ends["chance, ln(101)"] = (panel.axes.get_xlim()[1], CHANCE, CHANCE_STYLE)
    panel.seen([CHANCE])


def _logged_chance(panel: Panel, x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> None:
    """Chance as the runs logged it, a mean."""
    (line,) = panel.axes.plot(x, y, **LOGGED_STYLE, zorder=1.5)
    if len(x) == 1:
        line.set_marker("_")
    panel.ends["chance, logged"] = (float(x[-1]), float(y[-1]), LOGGED_STYLE)
    panel.seen(y)


# ------------------------------------------------------------------------------- against size, 4 7

Finals = Sequence[tuple[str, float]]
"""Last losses, each with whose it is ("seed 1"; of published ones empty)."""


def against_codebooks(panel: Panel, published: Published, work: Work | None) -> None:
    series: dict[str, dict[int, Finals]] = {}
    looks: dict[str, Look] = {}
    chance: dict[int, list[float]] = {}
    arms = list(published.by_codebooks)
    if work is not None:
        arms = arms_of_a_series(work.arms("pretrain"), "pretrain")
    for arm in arms:
        overrides = work.overrides("pretrain", arm) if work else {}
        size = codebooks_of(arm, overrides)
        losses = (
            _finals(work, "pretrain", arm, "valid")
            if work
            else [("", published.by_codebooks[arm].value)]
        )
        if size is None or not losses:
            continue
        label, look = series_of(arm)
        looks[label] = look
        series.setdefault(label, {})[size] = losses
        if work:
            chance.setdefault(size, []).extend(work.values("pretrain", arm, "valid", "chance_loss"))
    for place, (label, points) in enumerate(series.items()):
        aside = ASIDE ** (place - (len(series) - 1) / 2)
        _points(panel, points, label, looks[label], "codebooks", aside)
    sizes = [size for points in series.values() for size in points]
    doubling_axis(panel.axes, sizes, "codebooks")
    if work is None:
        _chance_line(panel)
    elif chance := {size: values for size, values in chance.items() if values}:
        _logged_chance(
            panel, sorted(chance), [float(np.mean(chance[size])) for size in sorted(chance)]
        )


def against_levels(panel: Panel, published: Published, work: Work | None) -> None:
    arms = published.arms("finetune")
    if work is not None:
        arms = arms_of_a_series(work.arms("finetune"), "finetune")
    filled = {"marker": "s", "linestyle": "-", "color": VERMILLION}
    hollow = {"marker": "o", "linestyle": "--", "color": BLUE, "markerfacecolor": PAPER}
    plans = [("train", "training window", filled)]
    if work is not None:
        plans.append(("valid", "validation", hollow))
    series: dict[str, dict[int, Finals]] = {}
    for split, label, _ in plans:
        for arm in arms:
            size = levels_of(arm, work.overrides("finetune", arm) if work else {})
            losses = (
                _finals(work, "finetune", arm, split)
                if work
                else [("", published.numbers["finetune", arm].value)]
            )
            if size is not None and losses:
                series.setdefault(label, {})[size] = losses
    sizes = [size for points in series.values() for size in points if size]
    doubling_axis(panel.axes, sizes, "RVQ levels")
    for place, (_, label, style) in enumerate(plans):
        points = series.get(label, {})
        reference = points.pop(0, None)
        aside = ASIDE ** (place - (len(series) - 1) / 2)
        _points(panel, points, label, style, "levels", aside)
        if reference:
            look: Look = {
                "color": style["color"],
                "linewidth": 1.2,
                "linestyle": (0, (4, 1.5, 1, 1.5)),
            }
            mean = float(np.mean([value for _, value in reference]))
            panel.axes.axhline(mean, **look, zorder=1.5)
            panel.ends[f"no RVQ, {label}"] = (panel.axes.get_xlim()[1], mean, look)
            panel.seen([mean])


def _finals(work: Work, stage: Stage, arm: str, split: str) -> list[tuple[str, float]]:
    runs = work.counted(stage, arm)
    found = ((f"seed {run.folder.seed}", run.final(split, LOSS[stage])) for run in runs)
    return [(name, value) for name, value in found if value is not None]


def _points(
    panel: Panel,
    points: Mapping[int, Finals],
    label: str,
    style: Look,
    unit: str,
    aside: float = 1.0,
) -> None:
    """A series of means; seeds as small marks on the line of their range.

    Args:
        unit: what ``points`` are by.
        aside: factor of the places, so that series don't hide each other.
    """
    if not points:
        return
    sizes = sorted(points)
    values = [[value for _, value in points[size]] for size in sizes]
    means = np.array([np.mean(of) for of in values])
    panel.axes.plot(np.array(sizes) * aside, means, **style, zorder=2)
    panel.seen(means)
    panel.ends[label] = (sizes[-1] * aside, float(means[-1]), style)
    for size, mean, of in zip(sizes, means, values):
        here, what = size * aside, f"{label}, {size} {unit}"
        if len(of) > 1:
            panel.several = True
            panel.axes.plot([here] * 2, [min(of), max(of)], color=style["color"], linewidth=1)
            panel.axes.plot([here] * len(of), of, **(style | SMALL))
            panel.seen(of)
            panel.points.append((here, float(mean), f"{what}, mean of {len(of)}: {mean:.5g}"))
        panel.points += [
            (here, value, f"{', '.join(filter(None, (what, name)))}: {value:.5g}")
            for name, value in points[size]
        ]


def doubling_axis(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xlabel(label)
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(sizes)), labels=[str(size) for size in sorted(set(sizes))])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
