"""What the figures of the codebooks show in one panel, from the runs' ``codes.npz``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from reproduce.report.measured import Run, Work, arms_of_a_series, codebooks_of
from reproduce.report.panels import Panel, doubling_axis, draw_line
from reproduce.report.published import Published
from reproduce.report.statistics import Curve
from reproduce.report.style import GREY, PAPER, Look, series_of

ASIDE = 1.2
"""Factor between the places of two series at the same number of codebooks."""


def draw_usage(panel: Panel, work: Work | None) -> None:
    """Effective share of the entries in use, in percent, of every codebook of every run."""
    for place, look, arm, runs in _columns(panel, work, filled=False):
        found = [
            (f"{arm}, seed {run.folder.seed}, codebook {number}: {100 * share:.3g} %", 100 * share)
            for run in runs
            for number, share in enumerate(run.codes.in_use(), 1)
            if np.isfinite(share)
        ]
        if found:
            values = np.array([value for _, value in found])
            marks = look | {"linestyle": "", "markersize": 4, "alpha": 0.6}
            panel.axes.plot(np.full(len(values), place), values, **marks)
            ends = [place / ASIDE**0.3, place * ASIDE**0.3]
            panel.axes.plot(ends, [values.mean()] * 2, color=look["color"], linewidth=2.2)
            panel.seen(values)
            panel.points += [(place, value, text) for text, value in found]


def draw_similarity(panel: Panel, published: Published, work: Work | None) -> None:
    """Mean cosine between codebooks, before training and after it."""
    if work is None:
        logged = published.icsl_logged
        for place, look, arm in _places(panel, list(logged), {}):
            _from_to(panel, place, look, {f"{arm}, logged": logged[arm]})
    else:
        _pairs(panel, work, "similarity_first", "similarity_last")
    _legend(panel, "first", "last")


def draw_information(panel: Panel, work: Work | None) -> None:
    """Normalized mutual information of pairs of codebooks, permuted and as measured."""
    _pairs(panel, work, "nmi_baseline", "nmi")
    _legend(panel, "by accident", "measured")


def draw_by_level(panel: Panel, work: Work | None, *, name: str) -> None:
    """``mse`` or ``perplexity`` of ``codes.npz`` after each level, a line an arm."""
    levels = []
    arms = arms_of_a_series(work.arms("finetune"), "finetune") if work else []
    for place, arm in enumerate(reversed(arms)):  # most levels at the bottom, with large marks
        assert work is not None
        found = [
            (f"seed {run.folder.seed}", run.codes.arrays.get(name, np.empty(0)))
            for run in work.counted("finetune", arm)
        ]
        finite = [(of, values) for of, values in found if len(values) and np.isfinite(values).all()]
        curves = [Curve(np.arange(1.0, len(values) + 1), values, name) for name, values in finite]
        draw_line(
            panel, "finetune", arm, work.overrides("finetune", arm), curves, 0, over="level",
            markersize=max(8.0 - place, 3.0),
        )  # fmt: skip
        levels += [len(values) for _, values in finite]
    doubling_axis(panel.axes, levels, "RVQ level")
    if levels:
        panel.axes.set_xlim(1 / 1.25, max(levels) * 1.25)


def _pairs(panel: Panel, work: Work | None, first: str, last: str) -> None:
    for place, look, arm, runs in _columns(panel, work):
        ends = {
            f"{arm}, seed {run.folder.seed}": (
                run.codes.pair_mean(first),
                run.codes.pair_mean(last),
            )
            for run in runs
        }
        known = {k: (a, b) for k, (a, b) in ends.items() if a is not None and b is not None}
        _from_to(panel, place, look, known)


def _from_to(
    panel: Panel, place: float, look: Look, ends: Mapping[str, tuple[float, float]]
) -> None:
    """For every run a hollow mark, a filled one to its right, and a line between them."""
    color, marker = look["color"], look["marker"]
    left, right = place / ASIDE**0.25, place * ASIDE**0.25
    for name, pair in ends.items():
        panel.axes.plot([left, right], pair, color=color, linewidth=0.9)
        panel.seen(pair)
        text = f"{name}: {pair[0]:.4g} (hollow), {pair[1]:.4g} (filled)"
        panel.points += [(left, pair[0], text), (right, pair[1], text)]
    for at, values, fill in ((left, 0, PAPER), (right, 1, color)):
        panel.axes.plot(
            [at] * len(ends), [pair[values] for pair in ends.values()], color=color, linestyle="",
            marker=marker, markersize=5, markerfacecolor=fill,
        )  # fmt: skip


def _columns(
    panel: Panel, work: Work | None, *, filled: bool = True
) -> Iterator[tuple[float, Look, str, list[Run]]]:
    """Place on the axis, look, name and the runs that hold something, of each arm that has such."""
    if work is None:
        return
    held = {
        arm: [run for run in work.counted("pretrain", arm) if run.codes.arrays]
        for arm in arms_of_a_series(work.arms("pretrain"), "pretrain")
    }
    arms = [arm for arm, runs in held.items() if runs]
    overrides = {arm: work.overrides("pretrain", arm) for arm in arms}
    for place, look, arm in _places(panel, arms, overrides, filled=filled):
        yield place, look, arm, held[arm]


def _places(
    panel: Panel,
    arms: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
    *,
    filled: bool = True,
) -> Iterator[tuple[float, Look, str]]:
    """Arms over their codebooks, series side by side; the axis and the legend with them.

    ``filled``: the legend's marks are, whatever the series' own, since hollow means something else.
    """
    sizes = {arm: codebooks_of(arm, overrides.get(arm, {})) for arm in arms}
    sized = {arm: size for arm, size in sizes.items() if size}
    labels = list(dict.fromkeys(series_of(arm)[0] for arm in sized))
    for arm, size in sized.items():
        label, look = series_of(arm)
        face = look["color"] if filled else look.get("markerfacecolor", look["color"])
        panel.legend[label] = Line2D(
            [], [], color=look["color"], marker=look["marker"], linestyle="", markersize=5,
            markerfacecolor=face,
        )  # fmt: skip
        yield size * ASIDE ** (labels.index(label) - (len(labels) - 1) / 2), look, arm
    doubling_axis(panel.axes, list(sized.values()), "codebooks")


def _legend(panel: Panel, hollow: str, filled: str) -> None:
    for label, fill in ((hollow, PAPER), (filled, GREY)):
        panel.legend[label] = Line2D(
            [], [], color=GREY, marker="d", linestyle="", markerfacecolor=fill, markersize=5
        )
