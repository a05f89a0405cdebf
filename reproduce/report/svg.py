"""A drawing of matplotlib's as SVG inside a page: its colours are the page's, its points speak.

Sharp at any zoom and small: no rasters, no fonts, coordinates to a hundredth of a point.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from reproduce.report.privacy import without_paths
from reproduce.report.style import ON_THE_PAGE

POINTS = "points"
"""Name of the group of marks that say their values where they are pointed at."""
LARGEST = 1.5
"""Pixels of the page a point of the drawing, at most, so that letters are alike in all drawings."""
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_COLOURS = {colour.lower(): f"var(--{name})" for colour, name in ON_THE_PAGE.items()}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline(drawing: str, titles: Sequence[str], label: str, prefix: str) -> str:
    """An ``svg`` element to stand in an HTML document.

    Args:
        drawing: what matplotlib wrote, with text as text; its group ``POINTS`` holds one mark a
            title.
        titles: what browsers show where a mark is pointed at.
        label: what the figure is, for those who hear the page.
        prefix: of the identifiers, which no two drawings of a page may share.

    Raises:
        ValueError: as many marks as titles there aren't.
    """
    root = ElementTree.fromstring(drawing)
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    for parent in list(root.iter()):
        for style in parent.findall(f"{_SVG}style"):
            parent.remove(style)
        if parent.get("id") == POINTS:
            _speak(parent, titles)
    names = _names(root, prefix)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = _attributes(element, names)
        element.tail = None
        if element.tag not in ("text", "title", "tspan"):
            element.text = None
        elif element.text:
            element.text = without_paths(element.text)
    _once(root)
    box = root.get("viewBox", "")
    widest = f"max-width: {float(box.split()[2]) * LARGEST / 16:.1f}rem"
    label = without_paths(label)
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label, "style": widest}
    return ElementTree.tostring(root, encoding="unicode")


def _once(root: ElementTree.Element) -> None:
    """What all marks of a shape look like is said by the shape alone."""
    shapes = {f"#{path.get('id')}": path for path in root.iter("path")}
    marks: dict[str, list[ElementTree.Element]] = {}
    for mark in root.iter("use"):
        marks.setdefault(mark.get("href", ""), []).append(mark)
    for name, alike in marks.items():
        looks = {mark.get("style") for mark in alike}
        if name in shapes and len(looks) == 1 and looks != {None}:
            own = shapes[name].get("style")
            shapes[name].set("style", "; ".join(filter(None, [*looks, own])))  # the last one counts
            for mark in alike:
                del mark.attrib["style"]


def _speak(group: ElementTree.Element, titles: Sequence[str]) -> None:
    """Marks without a look of their own, each with its title."""
    marks = list(group.iter(f"{_SVG}use"))
    if len(marks) != len(titles):
        raise ValueError(f"{len(marks)} marks for {len(titles)} titles")
    for mark, title in zip(marks, titles):
        ElementTree.SubElement(mark, f"{_SVG}title").text = title
    for element in group.iter():
        element.attrib.pop("style", None)
    group.set("class", POINTS)


def _names(root: ElementTree.Element, prefix: str) -> dict[str, str]:
    """Short names of what something in the drawing refers to."""
    found = []
    for element in root.iter():
        found += [element.attrib[_LINK][1:]] if _LINK in element.attrib else []
        found += re.findall(r"url\(#([^)]+)\)", element.get("clip-path", ""))
    return {old: f"{prefix}-{k}" for k, old in enumerate(dict.fromkeys(found))}


def _attributes(element: ElementTree.Element, names: dict[str, str]) -> dict[str, str]:
    """Renamed, rounded, coloured; without what says nothing."""
    kept = {}
    for key, value in element.attrib.items():
        if key == "id":
            if value in names:
                kept[key] = names[value]
            continue
        if key == _LINK:
            key, value = "href", f"#{names[value[1:]]}"
        elif key == "clip-path":
            value = re.sub(r"#([^)]+)", lambda m: f"#{names[m[1]]}", value)
        elif key == "style":
            value = re.sub(r"font-family: [^;]+;? ?", "", value)
            value = re.sub(r"#[0-9a-f]{6}", lambda m: _COLOURS.get(m[0], m[0]), value)
        elif key == "transform" and value.startswith("rotate(-0 "):
            continue
        kept[key] = _NUMBER.sub(lambda m: f"{float(m[0]):.2f}", value).replace("\n", "").strip()
    return kept
