"""ICSL and clipping crossed: effects are those that were put in, arms go by their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from made_up_runs import CHANCE, write_recipe, write_run
from matplotlib.figure import Figure

from reproduce.records import METRIC_COLUMNS
from reproduce.report import figures
from reproduce.report.attribution import excess_curves, factorials, paragraph
from reproduce.report.attribution_panels import PUBLISHED, draw_effects
from reproduce.report.findings import findings
from reproduce.report.measured import Work, read_work
from reproduce.report.panels import Panel
from reproduce.report.published import load_published
from reproduce.report.style import STYLE

ICSL, CLIP, TOGETHER = -0.004, 0.002, 0.001
CELLS = {
    "no_icsl_8cb": (False, False),
    "icsl_8cb": (True, True),
    "one": (True, False),
    "other": (False, True),
}


def settings(icsl: bool, clip: bool, **pretrain: Any) -> dict[str, Any]:
    return {
        "pretrain": {
            "icsl": {"weight": 0.1 if icsl else 0.0, "divided_by_accumulation": icsl},
            "optimizer": {"clip_norm": 1.0 if clip else None},
            "quantizer": {"codebooks": 8},
            **pretrain,
        }
    }


def make(root: Path, cells: dict[str, tuple[bool, bool]] = CELLS, **pretrain: Any) -> Work:
    """Losses of -0.004 by ICSL, +0.002 by clipping, +0.001 more by both, beside the seed's own."""
    write_recipe(root, pretrain=list(cells), finetune=[], seeds=[1, 2, 3])
    for arm, (icsl, clip) in cells.items():
        for seed in (1, 2, 3):
            loss = 4.5 + 0.1 * seed + ICSL * icsl + CLIP * clip + TOGETHER * (icsl and clip)
            run = write_run(
                root, "pretrain", arm, seed, loss, settings=settings(icsl, clip, **pretrain)
            )
            first = {"update": 0, "split": "valid", "chance_loss": CHANCE}
            first["contrastive_loss"] = CHANCE + 0.05
            row = ",".join(str(first.get(name, "")) for name in METRIC_COLUMNS["pretrain"])
            with (run / "metrics.csv").open("a", encoding="utf-8") as file:
                file.write(row + "\n")
    return read_work(root)


def test_effects_are_those_put_in(tmp_path: Path) -> None:
    (found,) = factorials(make(tmp_path))
    assert found.codebooks == 8
    assert found.seeds == (1, 2, 3)
    assert {arm: cell for cell, arm in found.arms.items()} == CELLS
    expected = {
        "ICSL": ICSL + TOGETHER / 2,
        "clipping": CLIP + TOGETHER / 2,
        "interaction": TOGETHER / 2,
        "both, as published": ICSL + CLIP + TOGETHER,
    }
    for name, values in found.effects.items():
        assert values == pytest.approx([expected.pop(name)] * 3, abs=1e-9)
    assert not expected


def test_no_crossing_without_all_four_alike(tmp_path: Path) -> None:
    three = {arm: cell for arm, cell in CELLS.items() if arm != "other"}
    work = make(tmp_path / "three", three)
    assert factorials(work) == []
    assert paragraph(load_published(), work) == ""
    make(tmp_path / "apart", three)
    for seed in (1, 2, 3):  # the fourth differs in one more setting
        write_run(
            tmp_path / "apart", "pretrain", "other", seed, 4.6,
            settings=settings(False, True, updates=1),
        )  # fmt: skip
    assert factorials(read_work(tmp_path / "apart")) == []


def test_only_seeds_that_all_four_have(tmp_path: Path) -> None:
    make(tmp_path)
    write_run(tmp_path, "pretrain", "other", 4, 4.9, settings=settings(False, True))
    assert factorials(read_work(tmp_path))[0].seeds == (1, 2, 3)


def test_loss_over_chance_before_training(tmp_path: Path) -> None:
    curves = excess_curves(make(tmp_path))
    assert list(curves) == [8]
    assert len(curves[8]) == 6  # the two arms without ICSL
    assert [curve.values[0] for curve in curves[8]] == pytest.approx([0.05] * 6)


def test_paragraph(tmp_path: Path) -> None:
    found = findings(load_published(), [make(tmp_path)])
    (text,) = (item.text for item in found if item.topic == "attribution")
    assert "With 8 codebooks ICSL and clipping were crossed, 3 seeds" in text
    assert "ICSL -0.0035 [-0.0035, -0.0035]" in text
    assert "both, as published -0.0010 [-0.0010, -0.0010] (published: -0.0058)" in text
    assert "over chance by +0.050 (8) nats" in text


def test_the_figure_shows_every_seed_and_the_published_difference(tmp_path: Path) -> None:
    work, axes = make(tmp_path), Figure().subplots()
    draw_effects(panel := Panel(axes), load_published(), work)
    drawn = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in drawn] == [
        pytest.approx(values) for values in factorials(work)[0].effects.values()
    ]
    assert panel.legend[PUBLISHED].get_marker() == "x"
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_ydata() == pytest.approx([4.6120 - 4.6178])


def test_the_figure_keeps_to_its_cells(tmp_path: Path) -> None:
    work, published = make(tmp_path), load_published()
    (plan,) = figures._attribution(published, [work])
    with mpl.rc_context(STYLE):
        sheet = figures.lay_out([work], plan)
        sheet.figure.draw_without_rendering()
        assert len(sheet.panels) == 2
        for panel, cell in zip(sheet.panels, sheet.cells):
            box, frame = panel.axes.get_tightbbox(), cell.transformed(sheet.figure.dpi_scale_trans)
            assert box is not None
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
