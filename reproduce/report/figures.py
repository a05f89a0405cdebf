"""The figures: the paper's 2 to 7 and those of the codebooks, as PNG and PDF.

The published panel comes first, then one a recipe. Colour and marker say codebooks or levels, line
style says ICSL, so that nothing hangs on colour alone. Bands and whiskers are the range over seeds.
The same input gives the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from reproduce.records import Stage
from reproduce.report.attribution import factorials
from reproduce.report.attribution_panels import draw_effects, draw_excess
from reproduce.report.code_panels import (
    draw_by_level,
    draw_information,
    draw_similarity,
    draw_usage,
)
from reproduce.report.measured import Work
from reproduce.report.panels import (
    LEAVES,
    UNFINISHED,
    Panel,
    against_codebooks,
    against_levels,
    draw_curves,
)
from reproduce.report.published import Published
from reproduce.report.style import GREY, STYLE

DPI = 110
TITLE_WIDTH = 44
"""Letters of a panel's title a line."""
LAST_IN_LEGEND = (
    "first", "last", "by accident", "measured", "range over seeds", UNFINISHED, LEAVES,
)  # fmt: skip
LOG_FROM = 3.0
"""A loss axis is logarithmic if its largest value is this many times the smallest."""
ROUGHLY_EQUAL = 2.0
"""Panels share their loss axis if that makes it at most this many times the published one."""
TOO_FLAT = 0.15
"""... and if every panel's curves then fill at least this share of it."""


@dataclass(frozen=True)
class Drawn:
    """A finished figure: file name without suffix, what it shows, and its PNG."""

    name: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Plan:
    """What a figure shows: file name without suffix, words, loss or other unit, and its panels.

    ``draw`` fills one panel with a recipe's runs, or with the published data if there is no work.
    ``beside``: fills a second panel with the same source; ``parts`` are then the two's titles.
    ``scale``: a loss axis that is wide turns "logarithmic"; "linear" ones stay so.
    """

    name: str
    title: str
    caption: str
    unit: str
    draw: Callable[[Panel, Work | None], None]
    published: bool = True
    scale: Literal["by width", "linear"] = "by width"
    beside: Callable[[Panel, Work | None], None] | None = None
    parts: tuple[str, ...] = ("",)


def draw_all(published: Published, works: Sequence[Work], out: Path) -> list[Drawn]:
    """Write figures 2 to 7, and those of the codebooks if there are any, as PNG and PDF."""
    drawn = []
    with mpl.rc_context(STYLE):
        plans = (
            *_paper(published),
            *_attribution(published, works),
            *_codebooks(published, works),
        )
        for plan in plans:
            png = _save(_figure(works, plan), out / plan.name)
            drawn.append(Drawn(plan.name, plan.title, plan.caption, png))
    return drawn


def _paper(published: Published) -> Iterator[Plan]:
    """Figures 2 to 7."""

    def curves(stage: Stage, split: str) -> Callable[[Panel, Work | None], None]:
        return lambda panel, work: draw_curves(panel, published, work, stage, split)

    contrastive, ctc = (
        "contrastive loss (nats per masked frame)",
        "CTC loss (nats per target token)",
    )
    seeds = "Line: mean over seeds; band: their range."
    yield Plan(
        "fig2_pretrain_train",
        "Figure 2. Contrastive loss in training",
        f"{seeds} The published axis shows the updates that the logs give (10 to 724), not the "
        "steps as plotted (0 to 2125).",
        contrastive,
        curves("pretrain", "train"),
    )
    yield Plan(
        "fig3_pretrain_valid",
        "Figure 3. Contrastive loss in validation",
        f"{seeds} Chance is ln(1 + kept negatives); measured panels show it as logged.",
        contrastive,
        curves("pretrain", "valid"),
    )
    yield Plan(
        "fig4_codebooks",
        "Figure 4. Final contrastive loss against the number of codebooks",
        "Validation loss at the end. Points: means over seeds; whiskers: their range.",
        contrastive,
        lambda panel, work: against_codebooks(panel, published, work),
    )
    yield Plan(
        "fig5_finetune_train",
        "Figure 5. CTC loss in training, with and without RVQ",
        f"{seeds} The study's number is the last point of this curve.",
        ctc,
        curves("finetune", "train"),
    )
    yield Plan(
        "fig6_finetune_valid",
        "Figure 6. CTC loss in validation, with and without RVQ",
        seeds,
        ctc,
        curves("finetune", "valid"),
    )
    yield Plan(
        "fig7_rvq_levels",
        "Figure 7. Final CTC loss against RVQ levels",
        "The published values are means of the last training window; measured panels show that and "
        "the validation loss. Whiskers: range over seeds.",
        ctc,
        lambda panel, work: against_levels(panel, published, work),
    )


def _attribution(published: Published, works: Sequence[Work]) -> Iterator[Plan]:
    """Of the recipes with a complete crossing of ICSL and clipping, if there is one."""
    if not any(factorials(work) for work in works):
        return
    yield Plan(
        "attribution",
        "Why the published pair differs: ICSL and clipping crossed, and what is over chance",
        "First: what each adds to the final validation loss of the arms with 8 codebooks, below 0 "
        "where it helps. Second: validation loss less chance of runs without ICSL, whose untrained "
        "targets put it over chance by more than the study's arms differ by.",
        "nats",
        lambda panel, work: draw_effects(panel, published, work),
        published=False,
        scale="linear",
        beside=draw_excess,
        parts=("effect on the final loss", "loss over chance"),
    )


def _codebooks(published: Published, works: Sequence[Work]) -> Iterator[Plan]:
    """What the runs' ``codes.npz`` hold; a figure that no run fills is left out."""

    def held(stage: Stage, name: str) -> bool:
        runs = (
            run for work in works for arm in work.arms(stage) for run in work.counted(stage, arm)
        )
        return any(name in run.codes.arrays for run in runs)

    if held("pretrain", "code_counts"):
        yield Plan(
            "codebook_usage",
            "Use of the codebooks",
            "Effective share of the entries in use on validation at the end, exp(entropy)/V: one "
            "mark a codebook and seed, a bar for their mean. 100 % would be all entries alike.",
            "entries in use (%)",
            draw_usage,
            published=False,
            scale="linear",
        )
    if held("pretrain", "similarity_last"):
        yield Plan(
            "codebook_similarity",
            "Similarity between codebooks, first and last",
            "Mean cosine between the entries of two codebooks, over all pairs: the value that ICSL "
            "pushes down. Hollow: before training; filled: after it; one pair of marks a seed. "
            "Published: first and last value in the run logs.",
            "mean cosine between codebooks",
            lambda panel, work: draw_similarity(panel, published, work),
            scale="linear",
        )
    if held("pretrain", "nmi"):
        yield Plan(
            "codebook_information",
            "What the codes of two codebooks share",
            "Normalized mutual information of the codes of the same frames, over all pairs, at the "
            "end. Hollow: with the frames permuted, so by accident; filled: as measured; one pair "
            "of marks a seed.",
            "normalized mutual information",
            draw_information,
            published=False,
            scale="linear",
        )
    for name, title, unit in (
        ("mse", "Residual error by RVQ level", "mean squared residual (per dimension)"),
        ("perplexity", "Perplexity by RVQ level", "perplexity of the level's codes"),
    ):
        if held("finetune", name):
            yield Plan(
                f"rvq_{'residual' if name == 'mse' else name}",
                title,
                "On validation at the end, after each level. Line: mean over seeds; band: their "
                "range.",
                unit,
                partial(draw_by_level, name=name),
                published=False,
                scale="by width" if name == "mse" else "linear",
            )


def _figure(works: Sequence[Work], plan: Plan) -> Figure:
    sources: list[tuple[Work | None, Callable[[Panel, Work | None], None], str]] = [
        (work, draw, part)
        for work in [*([None] if plan.published else []), *works]
        for draw, part in zip(filter(None, (plan.draw, plan.beside)), plan.parts)
    ]
    columns = min(len(sources), 3) if len(sources) != 4 else 2
    lines = -(-len(sources) // columns)
    figure = Figure(dpi=DPI)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    panels, title_lines = [], 1
    for axes, (source, draw, part) in zip(grid, sources):
        panel = Panel(axes)
        draw(panel, source)
        title = "published" if source is None else f"measured: {source.name}"
        wrapped = [*textwrap.wrap(title, TITLE_WIDTH), *([part] if part else [])]
        title_lines = max(title_lines, len(wrapped))
        axes.set_title("\n".join(wrapped))
        panel.settle()
        if not panel.heights:
            _empty(axes)
        panels.append(panel)
    for axes in grid[len(sources) :]:
        axes.set_visible(False)
    _limits(panels, plan)
    for panel in panels:
        panel.mark_leaving()
    for axes in grid[::columns]:
        axes.set_ylabel(plan.unit)
    legend: dict[str, Line2D | Patch] = {}
    for panel in panels:
        legend |= {label: item for label, item in panel.legend.items() if label not in legend}
    legend |= {label: legend.pop(label) for label in list(legend) if label in LAST_IN_LEGEND}
    rows = -(-len(legend) // (2 * columns))
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="lower center",
        ncols=-(-len(legend) // max(rows, 1)) or 1,
    )
    _place(figure, columns, lines, title_lines, rows)
    return figure


def _place(figure: Figure, columns: int, lines: int, title_lines: int, legend_rows: int) -> None:
    """Panels of one size in every figure, with room in inches for what stands around them.

    matplotlib's constrained layout measures every label and takes as long as drawing does.
    """
    wide, high = (3.4 if columns > 1 else 4.8), 2.7
    left, between, right = 0.8, 0.68, 0.15
    title, under = 0.08 + 0.17 * title_lines, 0.5
    legend = 0.1 + 0.19 * legend_rows
    width = left + columns * wide + (columns - 1) * between + right
    height = legend + lines * (under + high + title) + 0.05
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, wspace=between / wide,
        bottom=(legend + under) / height, top=1 - (title + 0.05) / height,
        hspace=(under + title) / high,
    )  # fmt: skip


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _limits(panels: Sequence[Panel], plan: Plan) -> None:
    """One loss axis for all panels if they are alike, else one each; logarithmic if it is wide."""
    filled = [panel for panel in panels if panel.heights]
    both = [height for panel in filled for height in panel.heights]
    spans = [float(np.ptp(panel.heights)) for panel in filled]
    shared = bool(both) and (
        np.ptp(both) <= ROUGHLY_EQUAL * spans[0] and np.ptp(both) <= min(spans) / TOO_FLAT
    )
    for panel in filled:
        heights = both if shared else panel.heights
        low, high = min(heights), max(heights)
        axis = panel.axes
        if plan.scale == "by width" and low > 0 and high > LOG_FROM * low:
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
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    path.with_suffix(".png").write_bytes(image.getvalue())
    figure.savefig(
        path.with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None, "Creator": None}
    )
    return image.getvalue()
