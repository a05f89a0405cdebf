"""Codebooks side by side: nearest code, look-up, sums by code, k-means, statistics of code use.

Letters: A codebooks side by side, V codes each, N vectors, D width, L levels of an arm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KMEANS_ITERATIONS = 10
"""Lloyd iterations of the k-means start (vector-quantize-pytorch ``kmeans_iters``)."""


def nearest(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """Index of the nearest code: vectors [A, N, D], codebooks [A, V, D] -> [A, N].

    |x - c|^2 less |x|^2, which all codes share: beside small codes it would only cost digits.
    """
    norms = codebooks.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(norms, vectors, codebooks.transpose(1, 2), alpha=-2).argmin(-1)


def lookup(codebooks: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
    """codebooks [A, V, D], codes [A, N] -> [A, N, D], into ``out`` if given (contiguous)."""
    arms, entries, width = codebooks.shape
    rows = (codes + entries * torch.arange(arms, device=codes.device).unsqueeze(1)).flatten()
    flat = None if out is None else out.view(-1, width)
    found = torch.index_select(codebooks.reshape(-1, width), 0, rows, out=flat)
    return found.view(*codes.shape, width)


def squared_norms(vectors: Tensor) -> Tensor:
    """vectors [A, N, D] -> [A] float64, sum of squares; adds up in float64 over vectors."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms.square_().sum(-1, dtype=torch.float64)


def code_counts(codes: Tensor, entries: int) -> Tensor:
    """codes [A, N] -> [A, V] int64, how often each was chosen."""
    counts = codes.new_zeros(codes.shape[0], entries)
    return counts.scatter_add_(1, codes, torch.ones_like(codes))


def add_by_code(sums: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """Add vectors [A, N, D] to sums [A, V, D] at their codes [A, N], in place.

    By index on CPU; by one-hot matrix product on GPUs, where adding by index has no fixed order.
    """
    (add_by_product if sums.is_cuda else add_by_index)(sums, vectors, codes)


def add_by_product(sums: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """:func:`add_by_code` as a one-hot matrix product."""
    one_hot = sums.new_zeros(*codes.shape, sums.shape[1]).scatter_(2, codes.unsqueeze(-1), 1.0)
    sums.baddbmm_(one_hot.transpose(1, 2), vectors)


def add_by_index(sums: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """:func:`add_by_code` one vector after the other."""
    for total, vector, code in zip(sums, vectors, codes):
        total.index_add_(0, code, vector)


def kmeans(vectors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: vectors [A, N, D], first means [A, V, D] -> means and sizes [A, V].

    A mean that loses all its vectors stays where it is.
    """
    sizes = means.new_zeros(means.shape[:2])
    for _ in range(KMEANS_ITERATIONS):
        codes = nearest(vectors, means)
        sizes = code_counts(codes, means.shape[1]).to(means.dtype)
        sums = torch.zeros_like(means)
        add_by_code(sums, vectors, codes)
        size = sizes.unsqueeze(-1)
        means = torch.where(size > 0, sums / size.clamp(min=1), means)
    return means, sizes


@dataclass(frozen=True)
class LevelStatistics:
    """One level over some stretch of data: error left after it, per element; use of its codes."""

    mse: float
    perplexity: float
    dead_codes: int


@dataclass(frozen=True)
class CodeSums:
    """Sums over frames of one arm, to be added over micro-batches and ranks.

    Attributes:
        squared_error: [L] float64, sum over frames of the mean over D of the squared residual
            left after each level.
        counts: [L, V] int64, frames that chose each code.
    """

    squared_error: Tensor
    counts: Tensor

    def __add__(self, other: CodeSums) -> CodeSums:
        return CodeSums(self.squared_error + other.squared_error, self.counts + other.counts)

    def tensors(self) -> list[Tensor]:
        """The tensors to sum over ranks, in place."""
        return [self.squared_error, self.counts]

    def levels(self) -> list[LevelStatistics]:
        """Error, perplexity (exp of the entropy of code use, 1..V) and unused codes of each level.

        Without any frame, error and perplexity are NaN and every code is dead.
        """
        counts = self.counts.cpu().double()
        frames = counts.sum(-1)
        share = counts / frames.unsqueeze(-1)
        perplexity = torch.where(frames > 0, torch.special.entr(share).sum(-1).exp(), math.nan)
        mse = self.squared_error.cpu() / frames
        dead = (counts == 0).sum(-1)
        return [
            LevelStatistics(float(e), float(p), int(d)) for e, p, d in zip(mse, perplexity, dead)
        ]
