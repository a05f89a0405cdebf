"""What a run's ``codes.npz`` says of its codebooks: their use, and what pairs of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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
    ``mse``, ``perplexity`` and ``dead_codes`` [L].
    """

    arrays: dict[str, Floats] = field(default_factory=dict)
    problem: str = ""

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
        counts = self.arrays.get("code_counts", np.empty((0, 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = counts / counts.sum(1, keepdims=True)
            entropy = -np.where(share > 0, share * np.log(share), 0.0).sum(1)
            return np.where(np.isfinite(share).all(1), np.exp(entropy) / counts.shape[1], np.nan)


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
        _check(arrays, _DIMENSIONS[stage])
    except Exception:  # zipfile, zlib and numpy raise a dozen kinds over damaged files
        return Codes(problem="codes.npz can't be read")
    return Codes(arrays)


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
