"""What the figures of the codebooks show in one panel, from the runs' ``codes.npz``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from reproduce.report.codes import Codes
from reproduce.report.measured import Work, arms_of_a_series, codebooks_of
from reproduce.report.panels import Panel, doubling_axis, draw_line
from reproduce.report.published import Published
from reproduce.report.statistics import Curve
from reproduce.report.style import GREY, Look, series_of

ASIDE = 1.2
"""Factor between the places of two series at the same number of codebooks."""


def draw_usage(panel: Panel, work: Work | None) -> None:
    """Effective share of the entries in use, in percent, of every codebook of every run."""
    for place, look, codes in _columns(panel, work):
        shares = [100 * run.in_use() for run in codes]
        values = np.concatenate(shares) if shares else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            marks = look | {"linestyle": "", "markersize": 4, "alpha": 0.6}
            panel.axes.plot(np.full(len(values), place), values, **marks)
            ends = [place / ASIDE**0.3, place * ASIDE**0.3]
            panel.axes.plot(ends, [values.mean()] * 2, color=look["color"], linewidth=2.2)
            panel.seen(values)


def draw_similarity(panel: Panel, published: Published, work: Work | None) -> None:
    """Mean cosine between codebooks, before training and after it."""
    if work is None:
        logged = published.icsl_logged
        for place, look, arm in _places(panel, list(logged), {}):
            _from_to(panel, place, look, [logged[arm]])
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
        found = [run.codes.arrays.get(name, np.empty(0)) for run in work.counted("finetune", arm)]
        finite = [values for values in found if len(values) and np.isfinite(values).all()]
        curves = [Curve(np.arange(1.0, len(values) + 1), values) for values in finite]
        draw_line(
            panel, "finetune", arm, work.overrides("finetune", arm), curves, 0,
            markersize=max(8.0 - place, 3.0),
        )  # fmt: skip
        levels += [len(values) for values in finite]
    doubling_axis(panel.axes, levels, "RVQ level")
    if levels:
        panel.axes.set_xlim(1 / 1.25, max(levels) * 1.25)
    panel.legend = dict(reversed(panel.legend.items()))


def _pairs(panel: Panel, work: Work | None, first: str, last: str) -> None:
    for place, look, codes in _columns(panel, work):
        ends = [(run.pair_mean(first), run.pair_mean(last)) for run in codes]
        _from_to(panel, place, look, [(a, b) for a, b in ends if a is not None and b is not None])


def _from_to(panel: Panel, place: float, look: Look, ends: Sequence[tuple[float, float]]) -> None:
    """For every run a hollow mark, a filled one to its right, and a line between them."""
    color, marker = look["color"], look["marker"]
    left, right = place / ASIDE**0.25, place * ASIDE**0.25
    for pair in ends:
        panel.axes.plot([left, right], pair, color=color, linewidth=0.9)
        panel.seen(pair)
    for at, values, fill in ((left, 0, "white"), (right, 1, color)):
        panel.axes.plot(
            [at] * len(ends), [pair[values] for pair in ends], color=color, linestyle="",
            marker=marker, markersize=5, markerfacecolor=fill,
        )  # fmt: skip


def _columns(panel: Panel, work: Work | None) -> Iterator[tuple[float, Look, list[Codes]]]:
    """Place on the axis, look and what the finished runs hold, of each arm that holds something."""
    if work is None:
        return
    held = {
        arm: [run.codes for run in work.counted("pretrain", arm) if run.codes.arrays]
        for arm in arms_of_a_series(work.arms("pretrain"), "pretrain")
    }
    arms = [arm for arm, codes in held.items() if codes]
    overrides = {arm: work.overrides("pretrain", arm) for arm in arms}
    for place, look, arm in _places(panel, arms, overrides):
        yield place, look, held[arm]


def _places(
    panel: Panel, arms: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[float, Look, str]]:
    """Arms over their codebooks, series side by side; the axis and the legend with them."""
    sizes = {arm: codebooks_of(arm, overrides.get(arm, {})) for arm in arms}
    sized = {arm: size for arm, size in sizes.items() if size}
    labels = list(dict.fromkeys(series_of(arm)[0] for arm in sized))
    for arm, size in sized.items():
        label, look = series_of(arm)
        panel.legend[label] = Line2D(
            [], [], color=look["color"], marker=look["marker"], linestyle="", markersize=5
        )
        yield size * ASIDE ** (labels.index(label) - (len(labels) - 1) / 2), look, arm
    doubling_axis(panel.axes, list(sized.values()), "codebooks")


def _legend(panel: Panel, hollow: str, filled: str) -> None:
    for label, fill in ((hollow, "white"), (filled, GREY)):
        panel.legend[label] = Line2D(
            [], [], color=GREY, marker="d", linestyle="", markerfacecolor=fill, markersize=5
        )
