"""Diversity of code use, from the mean probabilities of G codebooks with V entries [G, V]."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

DiversityForm = Literal["perplexity", "entropy"]


def entropy(mean_probabilities: Tensor) -> Tensor:
    """Entropy of each codebook's use in nats: [G, V] -> [G]. 0 log 0 is 0, with a finite gradient.

    (torch's xlogy has an infinite one there, and a softmax before it makes it NaN.)
    """
    floor = torch.finfo(mean_probabilities.dtype).tiny
    return -(mean_probabilities * mean_probabilities.clamp(min=floor).log()).sum(dim=-1)


def perplexity(mean_probabilities: Tensor) -> Tensor:
    """exp of the entropy: how many of its V entries each codebook uses, [G, V] -> [G]."""
    return entropy(mean_probabilities).exp()


def diversity(mean_probabilities: Tensor, form: DiversityForm) -> Tensor:
    """Diversity loss, a scalar in [0, 1) that is 0 when all entries are used alike.

    ``entropy``: the paper's eq. 1, the mean over codebooks of ``1 - H(p_g) / log V``.
    ``perplexity``: ``(G V - sum of perplexities) / (G V)``, as transformers and fairseq have it.

    Raises:
        ValueError: an unknown form.
    """
    codebooks, entries = mean_probabilities.shape
    if form == "entropy":
        return (1 - entropy(mean_probabilities) / math.log(entries)).mean()
    if form == "perplexity":
        total = codebooks * entries
        return (total - perplexity(mean_probabilities).sum()) / total
    raise ValueError(f"unknown diversity form {form!r}: entropy or perplexity")
