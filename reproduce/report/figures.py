"""The figures: the paper's 2 to 7 and those of the codebooks, as PNG, PDF and, a panel each, SVG.

The published panel comes first, then one a recipe that measured something. Colour and marker say
codebooks or levels, line style says ICSL, so that nothing hangs on colour alone. Lines are named at
their ends. The same input gives the same bytes.
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
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox
from PIL import Image

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
    KEY,
    Panel,
    against_codebooks,
    against_levels,
    draw_curves,
    wrapped,
)
from reproduce.report.published import Published
from reproduce.report.style import STYLE
from reproduce.report.svg import POINTS, inline

DPI = 110
TITLE_WIDTH = 40
"""Letters of a panel's title a line."""
LEFT, WIDE, HIGH, UNDER = 0.86, 2.65, 2.35, 0.45
"""Of a panel, in inches: room for the axis of losses, its axes, room for the axis under them."""
LETTER = 0.068
"""Width of a letter of a label, in inches."""
LEGEND_LETTERS = 14
"""Words up to so long stand two a row under a panel."""
POINTS_AN_INCH = 72
LOG_FROM = 3.0
"""A loss axis is logarithmic if its largest value is this many times the smallest."""
NEAREST_MARKS = 0.065
"""Labels at that share of an axis from each other don't touch."""
ROUGHLY_EQUAL = 2.0
"""Panels share their loss axis if that makes it at most this many times the published one."""
TOO_FLAT = 0.15
"""... and if every panel's curves then fill at least this share of it."""


@dataclass(frozen=True)
class Drawn:
    """A finished figure: file name without suffix, what it shows, and its panels as SVG.

    ``measured``: whether there is more on it than what was published.
    """

    name: str
    title: str
    caption: str
    panels: tuple[str, ...]
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What a figure shows: file name without suffix, words, loss or other unit, and its panels.

    ``of_seeds``, ``of_measured``: what the caption adds where there are several seeds of something,
    or anything measured.
    ``draw`` fills one panel with a recipe's runs, or with the published data if there is no work.
    ``beside``: fills a second panel with the same source; ``parts`` are then the two's titles.
    ``scale``: a loss axis that is wide turns "logarithmic"; "linear" ones stay so.
    """

    name: str
    title: str
    caption: str
    unit: str
    draw: Callable[[Panel, Work | None], None]
    of_seeds: str = ""
    of_measured: str = ""
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
        for place, plan in enumerate(plans):
            sheet = lay_out(works, plan)
            panels = _save(sheet, out / plan.name, plan, f"f{place}")
            measured = any(sheet.works)
            caption = [plan.caption, plan.of_measured if measured else ""]
            caption += [plan.of_seeds if any(p.several for p in sheet.panels) else ""]
            drawn.append(
                Drawn(plan.name, plan.title, " ".join(filter(None, caption)), panels, measured)
            )
    return drawn


def _paper(published: Published) -> Iterator[Plan]:
    """Figures 2 to 7."""

    def curves(stage: Stage, split: str) -> Callable[[Panel, Work | None], None]:
        return lambda panel, work: draw_curves(panel, published, work, stage, split)

    contrastive, ctc = (
        "contrastive loss (nats per masked frame)",
        "CTC loss (nats per target token)",
    )
    seeds = "Thin lines are seeds, thick ones their mean."
    marks = "Small marks are seeds, large ones their mean."
    yield Plan(
        "fig2_pretrain_train",
        "Figure 2. Contrastive loss in training",
        "The published axis shows the updates that the logs give (10 to 724), not the steps as "
        "plotted (0 to 2125). Published: one seed an arm.",
        contrastive,
        curves("pretrain", "train"),
        of_seeds=seeds,
    )
    yield Plan(
        "fig3_pretrain_valid",
        "Figure 3. Contrastive loss in validation",
        "Published: one seed an arm.",
        contrastive,
        curves("pretrain", "valid"),
        of_seeds=seeds,
        of_measured="Chance is ln(1 + kept negatives); measured panels show it as logged.",
    )
    yield Plan(
        "fig4_codebooks",
        "Figure 4. Final contrastive loss against the number of codebooks",
        "Validation loss at the end. Published: one seed an arm.",
        contrastive,
        lambda panel, work: against_codebooks(panel, published, work),
        of_seeds=marks,
    )
    yield Plan(
        "fig5_finetune_train",
        "Figure 5. CTC loss in training, with and without RVQ",
        "The study's number is the last point of this curve. Published: one seed an arm.",
        ctc,
        curves("finetune", "train"),
        of_seeds=seeds,
    )
    yield Plan(
        "fig6_finetune_valid",
        "Figure 6. CTC loss in validation, with and without RVQ",
        "Published: one seed an arm.",
        ctc,
        curves("finetune", "valid"),
        of_seeds=seeds,
    )
    yield Plan(
        "fig7_rvq_levels",
        "Figure 7. Final CTC loss against RVQ levels",
        "The published values are means of the last training window, of one seed.",
        ctc,
        lambda panel, work: against_levels(panel, published, work),
        of_seeds=marks,
        of_measured="Measured panels show that and the validation loss.",
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
                "On validation at the end, after each level.",
                unit,
                partial(draw_by_level, name=name),
                of_seeds="Thin lines are seeds, thick ones their mean.",
                published=False,
                scale="by width" if name == "mse" else "linear",
            )


@dataclass(frozen=True)
class Sheet:
    """A figure, its panels with whose they are (None: published), and the place of each in inches,
    with all that stands around it."""

    figure: Figure
    panels: list[Panel]
    works: list[Work | None]
    cells: list[Bbox]


def lay_out(works: Sequence[Work], plan: Plan) -> Sheet:
    """A figure of the panels that show something, three a row or two."""
    sources: list[tuple[Work | None, Callable[[Panel, Work | None], None], str]] = [
        (work, draw, part)
        for work in [*([None] if plan.published else []), *works]
        for draw, part in zip(filter(None, (plan.draw, plan.beside)), plan.parts)
    ]
    figure = Figure(dpi=DPI)
    panels: list[Panel] = []
    of: list[Work | None] = []
    for place, (work, draw, part) in enumerate(sources):
        panel = Panel(figure.add_axes((0, 0, 1, 1), label=str(place)))
        draw(panel, work)
        if panel.empty:
            panel.axes.remove()
            continue
        title = "published" if work is None else f"measured: {work.name}"
        title_lines = [*textwrap.wrap(title, TITLE_WIDTH), *([part] if part else [])]
        panel.axes.set_title("\n".join(title_lines))
        panel.settle()
        panels.append(panel)
        of.append(work)
    _limits(panels, plan)
    for panel in panels:
        panel.axes.set_ylabel(plan.unit)
        panel.mark_leaving()
        panel.name_ends(HIGH * POINTS_AN_INCH)
        if panel.legend:
            panel.axes.legend(
                panel.legend.values(), panel.legend.keys(), loc="upper center",
                bbox_to_anchor=(0.5, -UNDER / HIGH), ncols=_columns(panel), borderaxespad=0.0,
            )  # fmt: skip
    return Sheet(figure, panels, of, _place(figure, panels))


def _columns(panel: Panel) -> int:
    """Of its legend: two of short words or one."""
    return 2 if max(map(len, panel.legend), default=0) <= LEGEND_LETTERS else 1


def _place(figure: Figure, panels: Sequence[Panel]) -> list[Bbox]:
    """Panels of one size in every figure, with room in inches for what stands around them.

    matplotlib's constrained layout measures every label and takes as long as drawing does.
    """
    columns = min(len(panels), 3) if len(panels) != 4 else 2
    lines = -(-len(panels) // columns)
    names = [line for p in panels for name in p.ends for line in wrapped(name).split("\n")]
    longest = max(map(len, names), default=0)
    right = WIDE * (KEY[-1] - 0.96) + LETTER * longest if names else 0.2
    titles = max(panel.axes.get_title().count("\n") + 1 for panel in panels)
    legend = max(-(-len(panel.legend) // _columns(panel)) for panel in panels)
    above, under = 0.13 + 0.17 * titles, UNDER + (0.08 + 0.18 * legend if legend else 0)
    wide, high = LEFT + WIDE + right, under + HIGH + above
    figure.set_size_inches(columns * wide, lines * high)
    cells = []
    for number, panel in enumerate(panels):
        line, column = divmod(number, columns)
        x, y = column * wide, (lines - 1 - line) * high
        cells.append(Bbox.from_bounds(x, y, wide, high))
        panel.axes.set_position((
            (x + LEFT) / (columns * wide), (y + under) / (lines * high),
            WIDE / (columns * wide), HIGH / (lines * high),
        ))  # fmt: skip
    return cells


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
            axis.yaxis.set_major_locator(LogLocator(subs=_marks(np.log10(high / low))))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            room = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
            axis.set_ylim(low - room, high + room)
            axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _marks(decades: float) -> tuple[float, ...]:
    """What is marked of each decade of a logarithmic axis, so that labels don't touch."""
    for marks in ((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0)):
        if np.diff(np.log10([*marks, 10.0])).min() >= NEAREST_MARKS * decades:
            return marks
    return (1.0,)


def _save_png(figure: Figure, path: Path) -> None:
    """With the 256 colours that fit best: to the eye the same, a third of the bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(path, optimize=True, dpi=(DPI, DPI))


def _save(sheet: Sheet, path: Path, plan: Plan, prefix: str) -> tuple[str, ...]:
    """Write PNG and PDF; the panels as SVG, each alone so that a page can place them, with
    identifiers of their own by the prefix."""
    figure = sheet.figure
    _save_png(figure, path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None})
    for panel in sheet.panels:
        panel.axes.set_visible(False)
    drawings = []
    for number, (panel, cell) in enumerate(zip(sheet.panels, sheet.cells)):
        points, text = panel.points_inside(), io.StringIO()
        panel.axes.set_visible(True)
        panel.axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], "o", markersize=7,
            clip_on=False, zorder=9, gid=POINTS,
        )  # fmt: skip
        figure.savefig(
            text, format="svg", bbox_inches=cell, transparent=True, metadata={"Date": None}
        )
        panel.axes.set_visible(False)
        label = f"{plan.title}: {panel.axes.get_title()}".replace("\n", ", ")
        titles = [title for _, _, title in points]
        drawings.append(inline(text.getvalue(), titles, label, f"{prefix}-{number}"))
    return tuple(drawings)
