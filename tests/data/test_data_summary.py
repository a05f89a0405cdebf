"""What the summary warns of."""

from __future__ import annotations

from reproduce.data.packing import Entry
from reproduce.data.summary import Tally


def test_recordings_that_nobody_cut_are_named() -> None:
    tally = Tally()
    for number, seconds in enumerate((3, 60, 61, 3600)):
        name = f"u{number}"
        tally.add(Entry(name, "train", "", 16_000 * seconds, 0, "A", name, "", 16_000, 1, 0))
    warnings = list(tally._warnings("folder", {}))
    assert [text for text in warnings if "longer" in text] == [
        "2 utterances longer than 60 s, up to 3600 s: fine-tuning reads each whole, in time and "
        "memory that grow faster than the length; cut them, or leave them out of it by "
        "finetune.max_seconds: u2, u3"
    ]
