"""Nested subsets of the training split, by the study's rule: 10 min in 1 h in 10 h in all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from reproduce.data.audio import SAMPLE_RATE
from reproduce.records import SUBSETS

STUDY_SEED = 42
LIMITS = (600.0, 3600.0, 36000.0)
"""Seconds in each subset of `SUBSETS` but ``all``."""


def nested_subsets(
    seconds: Sequence[float], seed: int = STUDY_SEED, limits: Sequence[float] = LIMITS
) -> list[str]:
    """The smallest nested subset that holds each utterance.

    Shuffle with ``numpy.random.default_rng(seed).permutation`` over corpus order, then take until a
    limit is reached; the utterance that crosses it belongs to the subset (the study's rule).

    Args:
        seconds: lengths in corpus order, [N].
        seed: of the permutation.
        limits: ascending, one for each of ``10min``, ``1h``, ``10h``.

    Returns:
        a name of `SUBSETS` for each utterance, [N].
    """
    order = np.random.default_rng(seed).permutation(len(seconds))
    taken = np.cumsum(np.asarray(seconds, dtype=np.float64)[order])
    before = np.concatenate([[0.0], taken])[:-1]
    level = np.searchsorted(np.asarray(limits), before, side="right")
    names = np.empty(len(seconds), dtype=object)
    names[order] = np.asarray(SUBSETS, dtype=object)[level]
    return list(names)


def list_name(subset: str) -> str:
    """File of a subset's list under ``data/``."""
    return f"subset_{subset}.tsv"


class SubsetLists:
    """Writes the list of each nested training subset.

    ``subset_NAME.tsv`` has a line "id, tab, SHA-256 of the source, tab, text" an utterance, in
    corpus order. The SHA-256 of that file (what sha256sum prints) locks the subset: a recipe can
    require it with ``data.subset_sha256``.
    """

    def __init__(self, folder: Path) -> None:
        paths = {name: folder / list_name(name) for name in SUBSETS}
        self._files = {name: open(path, "wb") for name, path in paths.items()}  # noqa: SIM115
        self._digests = {name: hashlib.sha256() for name in SUBSETS}
        self._utterances = dict.fromkeys(SUBSETS, 0)
        self._samples = dict.fromkeys(SUBSETS, 0)

    def add(self, subset: str, id: str, sha256: str, text: str, samples: int) -> None:
        """Add a training utterance to `subset` and all that hold it."""
        line = f"{id}\t{sha256}\t{text}\n".encode()
        for name in SUBSETS[SUBSETS.index(subset) :]:
            self._files[name].write(line)
            self._digests[name].update(line)
            self._utterances[name] += 1
            self._samples[name] += samples

    def summary(self) -> dict[str, dict[str, Any]]:
        """By subset: ``utterances``, ``hours`` and ``sha256`` of its list."""
        return {
            name: {
                "utterances": self._utterances[name],
                "hours": round(self._samples[name] / SAMPLE_RATE / 3600, 6),
                "sha256": self._digests[name].hexdigest(),
            }
            for name in SUBSETS
        }

    def __enter__(self) -> SubsetLists:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
