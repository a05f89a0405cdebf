"""``data/corpus.png``: how long the utterances are and which characters their transcripts hold."""

from __future__ import annotations

import csv
import os
import unicodedata
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from reproduce.data.corpora import SPLITS
from reproduce.errors import DataError

FIGURE = "corpus.png"
CHARACTERS = 40
"""At most so many are shown."""


def draw_corpus(folder: Path) -> Path:
    """Draw the figure of a prepared corpus beside its manifest, whole or not at all.

    Returns:
        its path.

    Raises:
        DataError: the manifest can't be read.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from reproduce.report.style import BLUE, GREEN, STYLE, VERMILLION

    seconds, characters = _count(folder / "manifest.csv")
    longest = max(max(values) for values in seconds.values())
    # As many bins of a round width as fit: the same for all splits.
    width = next((w for w in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60) if longest / w <= 60), 300)
    edges = np.arange(0, longest + width, width)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
        lengths, counts = figure.subplots(1, 2)
        for split, color, line in zip(SPLITS, (BLUE, VERMILLION, GREEN), ("-", "--", ":")):
            if split in seconds:
                heights, _ = np.histogram(seconds[split], edges)
                label = f"{split}: {len(seconds[split])} utterances"
                lengths.stairs(heights, edges, color=color, linestyle=line, label=label)
        lengths.set_yscale("log", nonpositive="clip")
        lengths.set(xlabel="length (s)", ylabel=f"utterances per {width:g} s", title="Lengths")
        lengths.set_ylim(bottom=0.5)
        lengths.legend()
        shown = characters.most_common(CHARACTERS)
        total = sum(characters.values())
        counts.bar(range(len(shown)), [n / total for _, n in shown], color=BLUE)
        counts.set_xticks(range(len(shown)), _labels([c for c, _ in shown]), fontsize=7)
        for label in counts.get_xticklabels():
            label.set_rotation(90 if len(label.get_text()) > 2 else 0)
        more = len(characters) - len(shown)
        rest = f", {more} rarer ones not shown" if more > 0 else ""
        counts.set(ylabel="share", title=f"Characters of the training transcripts{rest}")
        counts.grid(axis="x", visible=False)
        counts.set_axisbelow(True)
        path = folder / FIGURE
        temporary = path.with_name(f".{os.getpid()}.{FIGURE}")
        try:
            figure.savefig(temporary, metadata={"Software": None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _labels(characters: list[str]) -> list[str]:
    """What the font can show of them; code points of others."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties("DejaVu Sans")))
    labels = []
    for character in characters:
        if character == " ":
            labels.append("space")
        elif not font.get_char_index(ord(character)):
            labels.append(f"U+{ord(character):04X}")
        else:
            mark = unicodedata.combining(character) > 0
            labels.append("\u25cc" + character if mark else character.replace("$", r"\$"))
    return labels


def _count(manifest: Path) -> tuple[dict[str, array[float]], Counter[str]]:
    """Seconds by split, and characters of the training transcripts."""
    seconds: dict[str, array[float]] = {}
    characters: Counter[str] = Counter()
    try:
        with open(manifest, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                seconds.setdefault(row["split"], array("d")).append(float(row["seconds"]))
                if row["split"] == "train":
                    characters.update(row["text"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"can't be read: {error}", where=str(manifest)) from None
    return seconds, characters
