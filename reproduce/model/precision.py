"""Full float32 inside, where a recipe allows faster arithmetic around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 in matrix products: for what chooses codes, adds up or compares.

    For what is computed inside. Autograd's own products for it come later, in the backward pass,
    with the precision that is set there.

    TF32 is switched through ``fp32_precision``, which torch's older ``allow_tf32`` sets as well:
    whichever it was allowed by, it is so again afterwards.
    """
    products = torch.backends.cuda.matmul
    allowed = products.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if allowed != "tf32":
            yield
            return
        products.fp32_precision = "ieee"
        try:
            yield
        finally:
            products.fp32_precision = allowed
