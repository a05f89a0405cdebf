"""Nested subsets of the training split, by the study's rule: 10 min in 1 h in 10 h in all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def subsets_within(subset: str) -> tuple[str, ...]:
    """The row labels that make up `subset`: ``1h`` is made of ``10min`` and ``1h``.

    Raises:
        ValueError: no such subset.
    """
    return SUBSETS[: SUBSETS.index(subset) + 1]
