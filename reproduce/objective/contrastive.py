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


class Comparison:
    """Which frames are masked, which are quantized, and which of these each masked one meets.

    Made where mask and negatives are (on the CPU, ahead of time), used where the model is.

    Args:
        masked: the masked frames.
        quantized: frames that have a target; they hold the masked ones and all negatives.
        negatives: frames drawn as distractors [N, K], positions in 0..F-1 of the same utterance.

    Attributes:
        counted: quantized frames that are masked [M] bool; None: all of them.
        index: own and drawn targets of each masked frame [N, 1 + K], among the M.
        within: the same, among the targets of the utterance.
    """

    def __init__(self, masked: Frames, quantized: Frames, negatives: Tensor) -> None:
        self.masked, self.quantized = masked, quantized
        rows = masked.rows[:, None]
        compared = torch.cat([masked.frames[:, None], negatives], dim=1)  # [N, 1 + K]
        index = quantized.where.flatten().cumsum(0).view_as(quantized.where) - 1  # [B, F] -> 0..M-1
        index = index[rows, compared]
        self.index = masked.sent(index)
        self.within = masked.sent(index - quantized.first[rows])
        alike = len(masked) == len(quantized)
        self.counted = None if alike else masked.sent(masked.where[quantized.where])


def compare(mask: Tensor, negatives: Tensor, device: torch.device) -> Comparison:
    """The comparison of all masked frames with their negatives.

    Args:
        mask: masked frames [B, F] bool.
        negatives: int64 [B, F, K], read at masked frames, or [N, K] in the mask's row-major order:
            positions in 0..F-1 of the same utterance. Frames outside the mask are quantized too
            where drawn.
        device: where the values will be.

    Raises:
        ValueError: negatives of a wrong shape or outside the utterance.
    """
    masked = Frames(mask, device)
    negatives = negatives.to(mask.device)
    if negatives.dim() == 3 and negatives.shape[:2] == mask.shape:
        negatives = negatives[mask]
    elif negatives.dim() != 2 or len(negatives) != len(masked):
        raise ValueError(
            f"negatives {list(negatives.shape)} don't fit a mask {list(mask.shape)} of "
            f"{len(masked)} frames: [B, F, K] or [N, K]"
        )
    frames, drawn_from = mask.shape[1], mask
    if negatives.numel():
        if negatives.min() < 0 or negatives.max() >= frames:
            raise ValueError(
                f"negatives {int(negatives.min())}..{int(negatives.max())} outside 0..{frames - 1}"
            )
        drawn_from = mask.clone()
        drawn_from[masked.rows[:, None].expand_as(negatives), negatives.long()] = True
    quantized = masked if torch.equal(drawn_from, mask) else Frames(drawn_from, device)
    return Comparison(masked, quantized, negatives.long())


def of_subset(subset: Comparison, of: Comparison) -> Tensor:
    """Places [n] of a comparison's masked frames among the N of another that holds them all.

    Both quantize masked frames alone, as where negatives are drawn among these.

    Raises:
        ValueError: a frame that isn't masked there, or quantized frames that aren't masked.
    """
    inside, outside = subset.masked.where, of.masked.where
    if bool((inside & ~outside).any()):
        raise ValueError("the subset has frames that aren't masked")
    if subset.counted is not None or of.counted is not None:
        raise ValueError("negatives outside the masked frames")
    return of.masked.sent(inside[outside].nonzero()[:, 0])


def contrastive(
    predictions: Tensor,
    targets: Tensor,
    codes: Tensor,
    comparison: Comparison,
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
        comparison: which of them each masked frame meets.
        entries: V, codes are 0..V-1.
        temperature: kappa, divides the cosines.
        remove_collisions: leave out distractors whose codes all equal the positive's.
    """
    masked, quantized = comparison.masked, comparison.quantized
    similarity = torch.bmm(
        masked.spread(normalize(predictions, dim=-1, eps=COSINE_EPS)),
        quantized.spread(normalize(targets, dim=-1, eps=COSINE_EPS)).transpose(1, 2),
    )
    logits = masked.gather(similarity).gather(1, comparison.within) / temperature

    removed = None
    if remove_collisions:
        identity = code_identity(codes, entries)[comparison.index]  # [N, 1 + K, words]
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
