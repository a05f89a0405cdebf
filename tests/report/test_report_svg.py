from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from reproduce.report.panels import apart
from reproduce.report.style import BLUE, STYLE
from reproduce.report.svg import POINTS, inline


@pytest.fixture(scope="module")
def drawing() -> str:
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        axes = (figure := Figure(figsize=(3, 2))).subplots()
        axes.plot([1, 2, 3], [1 / 3, 2 / 3, 0.5], color=BLUE, marker="o", markerfacecolor="#ffffff")
        axes.plot([1, 3], [1 / 3, 0.5], "s", gid=POINTS)
        axes.set_title("a & <b> of /home/jane/x")
        figure.savefig(text, format="svg", transparent=True)
    return text.getvalue()


def test_points_say_what_they_are(drawing: str) -> None:
    root = ElementTree.fromstring(inline(drawing, ["first: 1", "last <3>"], "what", "f"))
    (points,) = (group for group in root.iter("g") if group.get("class") == POINTS)
    marks = list(points.iter("use"))
    assert [mark.findtext("title") for mark in marks] == ["first: 1", "last <3>"]
    assert not any(element.get("style") for element in points.iter())  # the page's to say
    assert float(marks[0].get("x", "")) < float(marks[1].get("x", ""))
    with pytest.raises(ValueError, match="2 marks for 1 titles"):
        inline(drawing, ["one"], "what", "f")


def test_drawings_share_a_page(drawing: str) -> None:
    texts = [inline(drawing, ["", ""], "see /home/jane/runs", name) for name in ("a", "b")]
    names = [set(re.findall(r" id=\"([^\"]+)\"", text)) for text in texts]
    assert names[0]
    assert not names[0] & names[1]
    for text, own in zip(texts, names):
        assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)) == own
    assert 'aria-label="see runs"' in texts[0]
    assert "a &amp; &lt;b&gt; of x" in texts[0]
    assert not re.search(r"font-family|jane|http|<image|<metadata|\n", texts[0])


def test_colours_are_the_page_s(drawing: str) -> None:
    text = inline(drawing, ["", ""], "", "f")
    assert "stroke: var(--blue)" in text
    assert "fill: var(--paper)" in text
    assert "stroke: var(--grid)" in text
    assert not re.findall(r"#[0-9a-f]{6}", text)
    assert not re.findall(r"\d\.\d{3}", text)


def test_looks_are_said_once(drawing: str) -> None:
    root = ElementTree.fromstring(inline(drawing, ["", ""], "", "f"))
    shapes = {f"#{path.get('id')}": path.get("style", "") for path in root.iter("path")}
    marks = [mark for mark in root.iter("use") if "--blue" in shapes[mark.get("href", "")]]
    assert len(marks) == 3
    assert not any(mark.get("style") for mark in marks)
    (looks,) = {shapes[mark.get("href", "")] for mark in marks}
    assert "fill: var(--paper)" in looks


def test_looks_of_each_stay_where_marks_of_a_shape_differ() -> None:
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        ' viewBox="0 0 9 9"><defs><path id="m" d="M 0 0" style="stroke-width: 2"/></defs>'
        '<use xlink:href="#m" style="fill: none"/><use xlink:href="#m"/></svg>'
    )
    root = ElementTree.fromstring(inline(drawing, [], "", "f"))
    assert [mark.get("style") for mark in root.iter("use")] == ["fill: none", None]
    assert [path.get("style") for path in root.iter("path")] == ["stroke-width: 2"]


def test_labels_keep_apart_and_near() -> None:
    assert list(apart([0.9, 0.5, 0.1], [0.1] * 3)) == pytest.approx([0.9, 0.5, 0.1])
    assert list(apart([0.5, 0.5, 0.5], [0.1] * 3)) == pytest.approx([0.6, 0.5, 0.4])
    assert list(apart([1.0, 1.0, 0.2], [0.1] * 3)) == pytest.approx([0.95, 0.85, 0.2])
    assert list(apart([0.0, 0.0], [0.2, 0.1])) == pytest.approx([0.2, 0.05])
    assert len(apart([], [])) == 0
    rng = np.random.default_rng(1)
    for _ in range(50):
        wanted, sizes = np.sort(rng.random(9))[::-1], rng.uniform(0.02, 0.1, 9)
        places = apart(list(wanted), list(sizes))
        assert (-np.diff(places) >= (sizes[1:] + sizes[:-1]) / 2 - 1e-9).all()
        assert places[0] + sizes[0] / 2 <= 1 + 1e-9
        assert places[-1] - sizes[-1] / 2 >= -1e-9
