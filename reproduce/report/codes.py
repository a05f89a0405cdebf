"""What a run's ``codes.npz`` says of its codebooks: use, bits, and what pairs of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.records import Stage
from reproduce.report.statistics import Floats

_DIMENSIONS: dict[Stage, dict[str, int]] = {
    "pretrain": {
        "code_counts": 2, "similarity_first": 2, "similarity_last": 2, "nmi": 2, "nmi_baseline": 2,
    },
    "finetune": {"code_counts": 2, "mse": 1, "perplexity": 1, "dead_codes": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """Arrays of ``codes.npz`` by name, without the codebooks themselves; empty if there are none.

    Of pretraining with G codebooks of V entries: ``code_counts`` [G, V] on validation, and for each
    pair of codebooks [G, G] ``similarity_first``, ``similarity_last`` (mean cosine of their
    entries), ``nmi`` and ``nmi_baseline``. Of fine-tuning with L levels: ``code_counts`` [L, V],
    ``mse``, ``perplexity`` and ``dead_codes`` [L]; ``width`` is the number of dimensions of the
    features that are quantized, None where it isn't known.
    """

    arrays: dict[str, Floats] = field(default_factory=dict)
    problem: str = ""
    width: int | None = None

    def pair_mean(self, name: str) -> float | None:
        """Mean over pairs of different codebooks; None if there is no finite one."""
        table = self.arrays.get(name)
        if table is None:
            return None
        pairs = table[~np.eye(len(table), dtype=bool)]
        pairs = pairs[np.isfinite(pairs)]
        return float(pairs.mean()) if len(pairs) else None

    def in_use(self) -> Floats:
        """Share of its entries that each codebook uses, 1/V to 1 [G]: exp(entropy of its codes)/V.

        Unused entries don't count, nor do rare ones in full. NaN for a codebook never used.
        """
        entries = self.arrays.get("code_counts", np.empty((0, 1))).shape[1]
        return np.asarray(np.exp(self._entropy()) / entries, np.float64)

    def bits(self) -> Floats:
        """Bits a frame that each codebook's or level's codes take, the entropy of its codes [G].

        Their sum is an upper limit of what the codes of all levels take together.
        """
        return self._entropy() / math.log(2)

    def _entropy(self) -> Floats:
        """In nats [G]; NaN for a codebook never used."""
        counts = self.arrays.get("code_counts", np.empty((0, 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = counts / counts.sum(1, keepdims=True)
            entropy = -np.where(share > 0, share * np.log(share), 0.0).sum(1)
        return np.asarray(np.where(np.isfinite(share).all(1), entropy, np.nan), np.float64)

    def error_for_bits(self) -> float | None:
        """ln of the error left from the first level to the last, over what their bits must leave.

        The best code of R bits for independent Gaussian features of ``width`` dimensions leaves
        2^(-2 R / width) of their variance (Shannon). So this is
        ln(mse_L / mse_1) + 2 ln 2 (bits of the levels 2 to L) / width: below 0 where the levels
        leave less error than that, which they can only do if the features have structure and the
        codes follow it. None where it isn't known.
        """
        mse, bits = self.arrays.get("mse", np.empty(0)), self.bits()
        if not self.width or len(mse) < 2 or len(bits) != len(mse):
            return None
        if not (np.isfinite(bits).all() and np.isfinite(mse).all() and mse.min() > 0):
            return None
        return float(math.log(mse[-1] / mse[0]) + 2 * math.log(2) * bits[1:].sum() / self.width)


def read_codes(path: Path, stage: Stage) -> Codes:
    """Read ``codes.npz``; a file that is missing or damaged gives no arrays, never an error."""
    if not path.is_file():
        return Codes()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: np.asarray(file[name], dtype=np.float64)
                for name in _DIMENSIONS[stage]
                if name in file.files
            }
            width = _width(file) if stage == "finetune" else None
        _check(arrays, _DIMENSIONS[stage])
    except Exception:  # zipfile, zlib and numpy raise a dozen kinds over damaged files
        return Codes(problem="codes.npz can't be read")
    return Codes(arrays, width=width)


def _width(file: Any) -> int | None:
    """Of the codebooks [L, V, width]; a thinned copy holds the number instead."""
    if "width" in file.files:
        return int(file["width"])
    codebooks = np.asarray(file["codebooks"]) if "codebooks" in file.files else np.empty(0)
    return int(codebooks.shape[-1]) if codebooks.ndim == 3 else None


def _check(arrays: dict[str, Floats], dimensions: dict[str, int]) -> None:
    """One codebook or level a row in all arrays, pairs square, counts not negative."""
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError("arrays of different numbers of codebooks")
    for name, array in arrays.items():
        square = dimensions[name] == 1 or name == "code_counts" or array.shape[0] == array.shape[1]
        if array.ndim != dimensions[name] or not array.size or not square:
            raise ValueError(f"{name}: shape {array.shape}")
    if "code_counts" in arrays and not (arrays["code_counts"] >= 0).all():
        raise ValueError("negative counts")
