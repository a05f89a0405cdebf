"""The devices that a test is run on."""

from __future__ import annotations

import pytest
import torch

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
ORDER_OF_SUMS = {"cpu": 1e-6, "cuda": 1e-4}
"""How far two shapes of one matrix product may part: a GPU's library has kernels for each."""
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
