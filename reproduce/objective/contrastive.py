"""Contrastive loss: which of K + 1 quantized frames belongs to this masked frame.

N masked frames, M quantized frames, B utterances, F frames an utterance, K negatives,
G codebooks, D dimension of comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reproduce.objective.frames import Frames

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
    masked: Frames,
    quantized: Frames,
    *,
    entries: int,
    temperature: float = 0.1,
    remove_collisions: bool = True,
) -> ContrastiveTerms:
    """Contrastive loss of all masked frames, from one cosine matrix an utterance.

    The logits are gathered, not the K vectors of every frame: O(N (M/B + K)) values instead of
    O(N K D).

    Args:
        predictions: projected transformer outputs of the masked frames [N, D].
        targets: projected quantized frames [M, D].
        codes: their codes [M, G].
        negatives: frames drawn as distractors [N, K], positions in 0..F-1 of the same utterance,
            all of them in ``quantized``; on the masks' device.
        masked: the masked frames.
        quantized: frames that have a target; they hold the masked ones.
        entries: V, codes are 0..V-1.
        temperature: kappa, divides the cosines.
        remove_collisions: leave out distractors whose codes all equal the positive's.
    """
    rows = masked.rows[:, None]
    compared = torch.cat([masked.frames[:, None], negatives], dim=1)  # [N, 1 + K]
    index = quantized.where.flatten().cumsum(0).view_as(quantized.where) - 1  # [B, F] -> 0..M-1
    index = index[rows, compared]
    within = masked.sent(index - quantized.first[rows])  # 0..targets of the utterance

    similarity = torch.bmm(
        masked.spread(normalize(predictions, dim=-1, eps=COSINE_EPS)),
        quantized.spread(normalize(targets, dim=-1, eps=COSINE_EPS)).transpose(1, 2),
    )
    logits = masked.gather(similarity).gather(1, within) / temperature

    removed = None
    if remove_collisions:
        identity = code_identity(codes, entries)[masked.sent(index)]  # [N, 1 + K, words]
        removed = (identity[:, 1:] == identity[:, :1]).all(dim=2)
    return info_nce(logits[:, 0], logits[:, 1:], removed)


def code_identity(codes: Tensor, entries: int) -> Tensor:
    """Words of 63 bits [M, W] that are equal exactly where all G codes [M, G] in 0..V-1 are."""
    a_word = int(63 / math.log2(entries))
    words = []
    for part in torch.split(codes, a_word, dim=1):  # type: ignore[no-untyped-call]
        radix = entries ** torch.arange(part.shape[1], device=codes.device)
        words.append((part * radix).sum(dim=1))
    return torch.stack(words, dim=1)
