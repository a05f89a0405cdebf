"""Contrastive loss: which of K + 1 quantized frames belongs to this masked frame.

N masked frames, M quantized frames, B utterances, F frames an utterance, K negatives,
G codebooks, D dimension of comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

COSINE_EPS = 1e-8
"""Floor of a vector's norm, as in ``torch.cosine_similarity``."""


@dataclass(frozen=True)
class ContrastiveTerms:
    """Sums over ``count`` masked frames; losses in nats.

    Attributes:
        loss: sum of the InfoNCE losses, scalar.
        chance: sum of ln(1 + kept negatives): the loss of a model that knows nothing, scalar.
        kept: number of negatives left after collisions are removed, int64 scalar.
        count: number of masked frames.
    """

    loss: Tensor
    chance: Tensor
    kept: Tensor
    count: int


def info_nce(
    positive: Tensor, negatives: Tensor, removed: Tensor | None = None
) -> ContrastiveTerms:
    """InfoNCE from logits (paper, eq. 4; wav2vec 2.0, eq. 3): ``-log softmax`` of the positive.

    Args:
        positive: logits of the true targets [N].
        negatives: logits of the distractors [N, K].
        removed: distractors that don't count [N, K] bool; None: all count.
    """
    count, per_frame = negatives.shape
    if removed is None:
        kept = torch.full((count,), per_frame, device=negatives.device)
    else:
        negatives = negatives.masked_fill(removed, -torch.inf)
        kept = per_frame - removed.sum(dim=1)
    logits = torch.cat([positive[:, None], negatives], dim=1)
    loss = (logits.logsumexp(dim=1) - positive).sum()
    chance = kept.to(positive.dtype).log1p().sum()
    return ContrastiveTerms(loss, chance, kept.sum(), count)


def contrastive(
    predictions: Tensor,
    targets: Tensor,
    codes: Tensor,
    negatives: Tensor,
    mask: Tensor,
    quantized: Tensor,
    *,
    temperature: float = 0.1,
    remove_collisions: bool = True,
) -> ContrastiveTerms:
    """Contrastive loss of all masked frames, from one cosine matrix an utterance.

    The logits are gathered, not the K vectors of every frame: O(N (M/B + K)) values instead of
    O(N K D).

    Args:
        predictions: projected transformer outputs of the masked frames [N, D], in the row-major
            order of ``mask``.
        targets: projected quantized frames [M, D], in the row-major order of ``quantized``.
        codes: their codes [M, G].
        negatives: frames drawn as distractors [N, K], positions in 0..F-1 of the same utterance,
            all of them in ``quantized``.
        mask: masked frames [B, F] bool.
        quantized: frames that have a target [B, F] bool; holds ``mask``.
        temperature: kappa, divides the cosines.
        remove_collisions: leave out distractors whose codes all equal the positive's.
    """
    rows, frames = mask.nonzero(as_tuple=True)
    index = quantized.flatten().cumsum(0).view_as(quantized) - 1  # [B, F] -> 0..M-1
    first = index[:, :1] + 1 - quantized[:, :1].long()  # [B, 1]: an utterance's first target
    positive_index, negative_index = index[rows, frames], index[rows[:, None], negatives]
    offset = first[rows]  # [N, 1]

    similarity = torch.bmm(
        _by_utterance(normalize(predictions, dim=-1, eps=COSINE_EPS), mask),
        _by_utterance(normalize(targets, dim=-1, eps=COSINE_EPS), quantized).transpose(1, 2),
    )
    order = mask.cumsum(dim=1) - 1
    logits = similarity[rows, order[rows, frames]] / temperature  # [N, targets an utterance]
    positive = logits.gather(1, positive_index[:, None] - offset).squeeze(1)
    distractors = logits.gather(1, negative_index - offset)

    removed = None
    if remove_collisions:
        identity = code_identity(codes)
        removed = identity[negative_index] == identity[positive_index][:, None]
    return info_nce(positive, distractors, removed)


def code_identity(codes: Tensor) -> Tensor:
    """Numbers [M] that are equal exactly where all G codes [M, G] are equal."""
    if len(codes) == 0:
        return codes.new_zeros(0)
    identity = codes[:, 0]
    for column in codes.unbind(dim=1)[1:]:
        paired = identity * (column.max() + 1) + column
        identity = torch.unique(paired, return_inverse=True)[1]
    return identity


def _by_utterance(vectors: Tensor, where: Tensor) -> Tensor:
    """Rows [N, D] at the true places of ``where`` [B, F] as [B, most in one utterance, D]."""
    counts = where.sum(dim=1)
    padded = vectors.new_zeros(len(where), int(counts.max()), vectors.shape[1])
    slots = torch.arange(padded.shape[1], device=where.device) < counts[:, None]
    padded[slots] = vectors
    return padded
