"""Inter-codebook similarity loss (ICSL): how alike the entries of different codebooks are.

With unit entries ``e_ga = E_g[a] / |E_g[a]|`` of G codebooks of V entries and dimension d, the
paper's eq. 2 is

    1 / (G (G - 1)) * sum over i < j of s(i, j),   s(i, j) = 1/V^2 * sum over a, b of <e_ia, e_jb>

The V x V cosines need not be formed:

    signed    s(i, j) = <u_i, u_j>      u_g = mean over a of e_ga
    squared   s(i, j) = <S_i, S_j>_F    S_g = mean over a of e_ga e_ga^T

(``squared`` has <e_ia, e_jb>^2 in the sum) so the cost is O(G V d) and O(G V d^2). The signed form
only sees the codebooks' mean directions; the squared form sees overlap of the spaces they span.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

IcslForm = Literal["signed", "squared"]
IcslPairs = Literal["mean", "paper"]


def icsl(codebooks: Tensor, form: IcslForm = "signed", pairs: IcslPairs = "mean") -> Tensor:
    """The loss, a scalar.

    Args:
        codebooks: entries [G, V, d].
        form: mean of the cosines (as published) or of their squares.
        pairs: ``mean`` over the G (G - 1) / 2 pairs (as run), or half of it: the factor
            1 / (G (G - 1)) as the paper prints it.

    Returns:
        The similarity; 0 with a gradient of 0 for a single codebook.

    Raises:
        ValueError: an unknown form or pairs.
    """
    if pairs not in ("mean", "paper"):
        raise ValueError(f"unknown pairs {pairs!r}: mean or paper")
    count = len(codebooks)
    similarity = _similarity(codebooks, form)
    if count == 1:
        return similarity.sum() * 0.0
    total = similarity.triu(diagonal=1).sum() / (count * (count - 1))
    return 2.0 * total if pairs == "mean" else total


@torch.no_grad()
def codebook_similarity(codebooks: Tensor, form: IcslForm = "signed") -> Tensor:
    """All pairs s(i, j) without gradient: [G, V, d] -> [G, G], on the diagonal s(i, i)."""
    return _similarity(codebooks, form)


def _similarity(codebooks: Tensor, form: IcslForm) -> Tensor:
    unit = normalize(codebooks, dim=-1)
    if form == "signed":
        moments = unit.mean(dim=1)
    elif form == "squared":
        moments = (unit.transpose(1, 2) @ unit / unit.shape[1]).flatten(1)
    else:
        raise ValueError(f"unknown ICSL form {form!r}: signed or squared")
    return moments @ moments.T
