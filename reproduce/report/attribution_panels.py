"""What the figure of attribution shows in its two panels."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D

from reproduce.report.attribution import excess_curves, factorials, published_difference
from reproduce.report.measured import Work
from reproduce.report.panels import Panel, draw_line
from reproduce.report.published import Published
from reproduce.report.style import BLUE, CHANCE_STYLE, GREY, VERMILLION, handle

PUBLISHED = "published difference, both together"
NO_EFFECT = "no effect; chance"


def draw_effects(panel: Panel, published: Published, work: Work | None) -> None:
    """Each effect on the final loss: a mark a seed, their mean, and its 95 % interval."""
    found = factorials(work) if work else []
    axes = panel.axes
    for factorial in found[-1:]:  # one panel, one number of codebooks: the largest
        names = list(factorial.effects)
        for place, (name, values) in enumerate(factorial.effects.items()):
            interval = factorial.intervals[name]
            axes.plot([place - 0.12] * len(values), values, "o", color=BLUE, alpha=0.55,
                      markersize=4, markeredgewidth=0)  # fmt: skip
            axes.plot([place + 0.08], [interval.mean], "s", color=VERMILLION, markersize=6)
            panel.seen([*values, 0.0])
            panel.points += [(place - 0.12, value, f"{name}: {value:.4g}") for value in values]
            panel.points.append((place + 0.08, interval.mean, f"{name}, mean: {interval.mean:.4g}"))
            if interval.enough:
                axes.plot([place + 0.08] * 2, [interval.low, interval.high], color=VERMILLION)
                panel.seen([interval.low, interval.high])
        axes.axhline(0, **CHANCE_STYLE, zorder=1.5)
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
        panel.legend |= {
            "a seed": Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=4),
            "mean and 95 % interval": Line2D([], [], color=VERMILLION, marker="s", markersize=6),
            NO_EFFECT: handle(CHANCE_STYLE),
        }
        difference = published_difference(factorial, published)
        if difference is not None:
            axes.plot([len(names) - 1 + 0.25], [difference], "x", color=GREY, markersize=7)
            panel.seen([difference])
            panel.legend[PUBLISHED] = Line2D(
                [], [], color=GREY, marker="x", linestyle="", markersize=7
            )


def draw_excess(panel: Panel, work: Work | None) -> None:
    """Validation loss less chance over updates, without ICSL, a line a number of codebooks."""
    panel.axes.set_xlabel("update")
    for place, (size, curves) in enumerate(excess_curves(work).items() if work else ()):
        arm = f"no_icsl_{size}cb"
        draw_line(panel, "pretrain", arm, {}, curves, place)
        panel.seen(np.zeros(1))
    panel.axes.axhline(0, **CHANCE_STYLE, zorder=1.5)
