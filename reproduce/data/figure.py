"""``data/corpus.png``: how long the utterances are and which characters their transcripts hold."""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reproduce.data.corpora import SPLITS
from reproduce.data.manifest import Manifest
from reproduce.records import write_bytes

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
    from matplotlib.font_manager import FontProperties
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    from reproduce.report.style import BLUE, GREEN, STYLE, VERMILLION

    seconds, characters = _count(folder)
    longest = max(values.max() for values in seconds.values())
    # As many bins of a round width as fit: the same for all splits.
    width = next((w for w in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60) if longest / w <= 60), 300)
    edges = np.arange(0, longest + width, width)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
        lengths, shares = figure.subplots(1, 2)
        for split, color, line in zip(SPLITS, (BLUE, VERMILLION, GREEN), ("-", "--", ":")):
            if split in seconds:
                heights, _ = np.histogram(seconds[split], edges)
                label = f"{split}: {len(seconds[split])}"
                lengths.stairs(heights, edges, color=color, linestyle=line, label=label)
        lengths.set_yscale("log", nonpositive="clip")
        lengths.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        lengths.yaxis.set_major_formatter("{x:g}")
        lengths.yaxis.set_minor_locator(NullLocator())
        lengths.set(xlabel="length (s)", ylabel=f"utterances per {width:g} s")
        lengths.set_ylim(bottom=0.7)
        lengths.set_title("Utterances", pad=24)
        lengths.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(SPLITS))
        shown = characters.most_common(CHARACTERS)
        total = sum(characters.values())
        shares.bar(range(len(shown)), [n / total for _, n in shown], color=BLUE)
        labels = [_label(character) for character, _ in shown]
        shares.set_xticks(range(len(shown)), [text for text, _ in labels], fontsize=7)
        for tick, (text, font) in zip(shares.get_xticklabels(), labels):
            tick.set_rotation(90 if len(text) > 2 else 0)
            if font is not None:
                tick.set_fontproperties(FontProperties(fname=font, size=8))
        more = len(characters) - len(shown)
        rest = f"; {more} rarer ones not shown" if more > 0 else ""
        shares.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        shares.set_title(f"Characters of the training transcripts{rest}", pad=24)
        shares.grid(axis="x", visible=False)
        shares.set_axisbelow(True)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    write_bytes(folder / FIGURE, image.getvalue())
    return folder / FIGURE


def _label(character: str) -> tuple[str, str | None]:
    """A character for people, and the font file that shows it; its code point where none does."""
    from matplotlib.font_manager import findfont

    if character == " ":
        return "space", None
    usual = findfont("DejaVu Sans")
    if unicodedata.category(character)[0] not in "CZ":  # those show nothing
        mark = unicodedata.category(character)[0] == "M"
        text = "\u25cc" + character if mark else character.replace("$", r"\$")
        if _shows(usual, character):
            return text, None
        if other := next((font for font in _other_fonts() if _shows(font, character)), None):
            return text if _shows(other, "\u25cc") else text[-1], other
    return f"U+{ord(character):04X}", None


@lru_cache(maxsize=1)
def _other_fonts() -> list[str]:
    """Font files, upright ones; not the last resort, which has a box for every character."""
    from matplotlib.font_manager import fontManager

    upright = [f for f in fontManager.ttflist if f.style == "normal" and "Resort" not in f.name]
    return [f.fname for f in sorted(upright, key=lambda f: (f.weight != 400, f.name))]


def _shows(font: str, character: str) -> bool:
    from matplotlib.font_manager import get_font

    try:
        face = get_font(font)
        face.set_size(8, 100)  # bitmaps of colour can't be scaled
        return face.get_char_index(ord(character)) > 0
    except (OSError, RuntimeError):
        return False


def _count(folder: Path) -> tuple[dict[str, NDArray[np.float64]], Counter[str]]:
    """Seconds by split, and characters of the training transcripts."""
    manifest = Manifest.read(folder, verify=False)
    rows = {split: manifest.select(split=split) for split in SPLITS}
    seconds = {split: own.array("seconds") for split, own in rows.items() if len(own)}
    characters: Counter[str] = Counter()
    texts = iter(rows["train"].strings("text"))
    while some := list(islice(texts, 10_000)):
        characters.update("".join(some))
    return seconds, characters
