"""What figures 2 to 7 show in one panel: the published data or the runs of one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
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
    VERMILLION,
    Look,
    handle,
    look_of,
    series_of,
)

UNFINISHED, LEAVES = "unfinished or failed run", "where it leaves the axis"


@dataclass
class Panel:
    """What one panel holds while it is drawn: y values for its limits, and its legend.

    Unfinished and failed runs don't set the limits: a loss on its way to infinity would press
    everything else flat. Their curves are kept to be marked where they leave the axis.
    """

    axes: Axes
    heights: list[float] = field(default_factory=list)
    unfinished: list[tuple[Curve, str]] = field(default_factory=list)
    legend: dict[str, Line2D | Patch] = field(default_factory=dict)

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


# ------------------------------------------------------------------------------- curves, 2 3 5 6


def draw_curves(
    panel: Panel, published: Published, work: Work | None, stage: Stage, split: str
) -> None:
    paper = published.curve_arms(stage, split)
    panel.axes.set_xlabel("update")
    panel.axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
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
            (line,) = panel.axes.plot(updates, mean, **LOGGED_STYLE, zorder=1.5)
            if len(updates) == 1:
                line.set_marker("_")
            panel.axes.fill_between(updates, low, high, color=GREY, alpha=0.15, linewidth=0)
            panel.legend["chance as logged"] = handle(LOGGED_STYLE)
            panel.seen(mean)


def _read(work: Work, stage: Stage, arm: str, split: str) -> bool:
    return any(len(run.curve(split, LOSS[stage])) for run in work.of(stage, arm))


def draw_line(
    panel: Panel,
    stage: Stage,
    arm: str,
    overrides: Mapping[str, Any],
    curves: Sequence[Curve],
    place: int,
    **more: Any,
) -> None:
    """Mean and range of an arm's curves; ``more`` changes its look."""
    if not curves:
        return
    look = look_of(stage, arm, overrides) | more
    updates, mean, low, high = mean_and_range(curves)
    every = max(1, len(updates) // 7)
    order = 2.0 if look["markerfacecolor"] == "white" else 2.1  # wide and hollow beneath
    panel.axes.plot(updates, mean, **look, zorder=order, markevery=(place * every // 4, every))
    panel.seen(mean)
    panel.legend[arm] = handle(look)
    if len(curves) > 1:
        panel.axes.fill_between(updates, low, high, color=look["color"], alpha=0.18, linewidth=0)
        panel.legend["range over seeds"] = Patch(facecolor=GREY, alpha=0.3)
        panel.seen(low)
        panel.seen(high)


def _unfinished(
    panel: Panel, stage: Stage, arm: str, overrides: Mapping[str, Any], curve: Curve
) -> None:
    color = look_of(stage, arm, overrides)["color"]
    style = {"color": color, "linestyle": ":", "linewidth": 0.9}
    panel.axes.plot(curve.updates, curve.values, **style)
    panel.axes.plot(curve.updates[-1:], curve.values[-1:], "x", color=color)
    panel.legend[UNFINISHED] = Line2D([], [], color=GREY, linestyle=":", linewidth=0.9, marker="x")
    panel.unfinished.append((curve, color))


def _chance_line(panel: Panel) -> None:
    panel.axes.axhline(CHANCE, **CHANCE_STYLE, zorder=1.5)
    panel.legend["chance ln(101) = 4.6151"] = handle(CHANCE_STYLE)
    panel.seen([CHANCE])


# ------------------------------------------------------------------------------- against size, 4 7


def against_codebooks(panel: Panel, published: Published, work: Work | None) -> None:
    series: dict[str, dict[int, list[float]]] = {}
    looks: dict[str, Look] = {}
    chance: dict[int, list[float]] = {}
    arms = list(published.by_codebooks)
    if work is not None:
        arms = arms_of_a_series(work.arms("pretrain"), "pretrain")
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
        label, look = series_of(arm)
        looks[label] = look
        series.setdefault(label, {})[size] = losses
        if work:
            chance.setdefault(size, []).extend(work.values("pretrain", arm, "valid", "chance_loss"))
    for place, (label, points) in enumerate(series.items()):
        _points(panel, points, label, looks[label], 1 + 0.05 * (place if work else 0))
    if work is None:
        _chance_line(panel)
    elif chance := {size: values for size, values in chance.items() if values}:
        sizes = sorted(chance)
        means = [float(np.mean(chance[size])) for size in sizes]
        (line,) = panel.axes.plot(sizes, means, **LOGGED_STYLE, zorder=1.5)
        if len(sizes) == 1:
            line.set_marker("_")
        panel.legend["chance as logged"] = handle(LOGGED_STYLE)
        panel.seen(means)
    doubling_axis(panel.axes, [size for points in series.values() for size in points], "codebooks")


def against_levels(panel: Panel, published: Published, work: Work | None) -> None:
    arms = published.arms("finetune")
    if work is not None:
        arms = arms_of_a_series(work.arms("finetune"), "finetune")
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
            panel.legend[f"no RVQ, {label}"] = handle(look)
            panel.seen([float(np.mean(reference))])
        sizes += points
    doubling_axis(panel.axes, sizes, "RVQ levels")


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
    panel.legend[label] = handle(style)
    panel.seen(means - down)
    panel.seen(means + up)


def doubling_axis(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xlabel(label)
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(sizes)), labels=[str(size) for size in sorted(set(sizes))])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
