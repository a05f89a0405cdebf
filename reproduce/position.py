"""Randomness as a function of position: no state to store, the same on any number of processes.

Every random choice names its stream ("mask", "negatives", "gumbel", "forward", "shuffle", ...) and
its position (update, micro-batch, ...). Nothing else feeds it, so a resumed or redistributed run
draws what the uninterrupted one drew.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, stream: str, *position: int | str) -> int:
    """A 63-bit seed from (seed, stream, position), stable over platforms and versions."""
    key = "/".join([str(seed), stream, *map(str, position)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, *position: int | str) -> np.random.Generator:
    """A fresh numpy generator for (seed, stream, position)."""
    return np.random.default_rng(derive_seed(seed, stream, *position))
