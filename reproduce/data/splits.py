"""Splits: validation drawn from a corpus that has none, of what is usable, so that rejecting an
utterance can't empty it; and audio that training and another split share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from reproduce.data.columns import Rows
from reproduce.data.corpora import DRAWN, SPLITS, Rejected
from reproduce.data.packing import Entry
from reproduce.position import derive_seed


class DrawnSplits:
    """Which of a corpus's utterances whose split is `DRAWN` validate.

    Speakers, in the order of a hash of their names, go to validation until it has its share of the
    utterances, so that no speaker is shared; with fewer than 2 / share speakers, utterances do, by
    a hash of their ids.

    Args:
        entries: everything packed; iterated twice. Their splits tell the share, 0 to 1; above 0 at
            least one of several validates.
    """

    def __init__(self, entries: Iterable[Entry | Rejected]) -> None:
        speakers: set[str] = set()
        total, share = 0, 0.0
        for entry in _drawn(entries):
            speakers.add(entry.speaker)
            total += 1
            share = float(entry.split.removeprefix(DRAWN))
        self._by_speaker = share > 0 and len(speakers - {""}) >= 2 / share
        self._valid: set[int] = set()
        wanted = round(share * total)
        if share > 0 and total > 1:
            wanted = max(wanted, 1)
        if not wanted:
            return
        sizes = Counter(self._group(entry) for entry in _drawn(entries))
        for group in sorted(sizes):
            if wanted <= 0:
                break
            wanted -= sizes[group]
            self._valid.add(group)

    def __call__(self, entry: Entry | Rejected) -> Entry | Rejected:
        """The entry with its split. What was rejected is lost to training, since validation isn't
        drawn from it."""
        if not entry.split.startswith(DRAWN):
            return entry
        if isinstance(entry, Rejected):
            return replace(entry, split="train")
        return replace(entry, split="valid" if self._group(entry) in self._valid else "train")

    def _group(self, entry: Entry) -> int:
        name = (entry.speaker if self._by_speaker else "") or entry.id
        return derive_seed(0, "valid", name.encode("utf-8", "backslashreplace").decode())


def _drawn(entries: Iterable[Entry | Rejected]) -> Iterator[Entry]:
    for entry in entries:
        if isinstance(entry, Entry) and entry.split.startswith(DRAWN):
            yield entry


def shared_audio(rows: Rows) -> dict[str, list[tuple[str, str]]]:
    """Held-out utterances whose audio, byte for byte, is trained on too.

    Args:
        rows: of a manifest; audio is known by its ``sha256``.

    Returns:
        ``valid`` and ``test``, where there are any -> their ids, each with that of training.
    """
    codes = rows.array("split")
    parts = {split: rows.take(np.flatnonzero(codes == n)) for n, split in enumerate(SPLITS)}
    held_out: dict[str, list[tuple[str, str]]] = {}
    for split in SPLITS[1:]:
        part = parts[split]
        for sha256, id_ in zip(part.strings("sha256"), part.strings("id")):
            held_out.setdefault(sha256, []).append((split, id_))
    shared: dict[str, list[tuple[str, str]]] = {}
    train = parts["train"]
    for sha256, trained in zip(train.strings("sha256"), train.strings("id")):
        for split, id_ in held_out.pop(sha256, ()):
            shared.setdefault(split, []).append((id_, trained))
    return shared
