"""Connectionist temporal classification (Graves et al. 2006), summed, and greedy decoding.

Letters: A arms, B batch, F frames, V tokens, S longest target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reproduce.objective.frames import sent, valid_frames


@dataclass(frozen=True)
class CtcTerms:
    """A micro-batch's part of the loss.

    Attributes:
        loss: nats: sum over utterances of the CTC loss / target length, a scalar, or [A] of several
            arms. Divided by ``utterances`` it is what ``torch.nn.CTCLoss(reduction="mean")``
            returns.
        utterances: B, the zeroed ones included (as torch's mean does).
        zeroed: utterances without any alignment: they add zero, and no gradient.
    """

    loss: Tensor
    utterances: int
    zeroed: int


def ctc_loss(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
) -> CtcTerms:
    """CTC loss of logits [B, F, V], in float32 (float64 stays) under autocast too.

    A target needs a frame a token and one more for each token that repeats its predecessor. An
    utterance with fewer has no alignment and an infinite loss: it is zeroed, as torch's
    ``zero_infinity`` does. It is told by its lengths and not by its loss, so that NaN or infinite
    logits are never zeroed: the loss is then not finite. An empty target is worth
    -sum(log p(blank)), divided by 1.

    All but the logits is best on the CPU: what follows from it needn't be waited for. torch's
    ``ctc_loss`` copies a GPU's targets back to look at them, so what lies below it is called. What
    remains is that torch sends the lengths to a GPU and waits, forwards and backwards: therefore
    one call is for all arms.

    Args:
        logits: [B, F, V], or of several arms with the same targets [A, B, F, V].
        targets: [B, S] int64, padded with anything, or all targets concatenated in one dimension.
        input_lengths: [B] frames.
        target_lengths: [B] tokens.
    """
    device, arms = logits.device, logits.shape[:-3]
    targets, lengths, sizes = targets.cpu(), input_lengths.cpu(), target_lengths.cpu()
    if targets.ndim == 1:
        targets = pad_sequence(list(torch.split(targets, sizes.tolist())), batch_first=True)
    possible = required_frames(targets, sizes) <= lengths
    finite = torch.where(possible, sizes, 0)  # a stand-in, cancelled below
    with torch.autocast(device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses, _ = torch._ctc_loss(
            wide.log_softmax(-1).flatten(0, -3).transpose(0, 1),
            sent(targets, device).repeat(math.prod(arms), 1),
            lengths.tolist() * math.prod(arms),
            finite.tolist() * math.prod(arms),
            blank,
        )
        counted, divisors = sent(torch.stack([possible, sizes.clamp(min=1)]), device)
        loss = (losses.view(*arms, -1) * counted / divisors).sum(-1)
    return CtcTerms(loss, logits.shape[-3], int((~possible).sum()))


def required_frames(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Fewest frames [B] that can hold targets [B, S]: tokens plus immediate repetitions."""
    repeats = targets[:, 1:] == targets[:, :-1]
    return target_lengths + (repeats & valid_frames(target_lengths - 1, repeats.shape[1])).sum(-1)


def greedy_decode(best: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """The likeliest token of each frame [B, F], repeats collapsed, blanks dropped."""
    return [
        [token for token in row[:length].unique_consecutive().tolist() if token != blank]
        for row, length in zip(best.cpu(), lengths.tolist())
    ]


def blank_frames(best: Tensor, lengths: Tensor, blank: int = 0) -> tuple[Tensor, int]:
    """(frames whose likeliest token is blank, frames): sums whose ratio is the blank rate.

    Args:
        best: the likeliest token of each frame [B, F], or of several arms [A, B, F].
        lengths: frames of each utterance [B], best on the CPU.

    Returns:
        A scalar or [A], int64, where ``best`` is, and a number.
    """
    inside = valid_frames(lengths, best.shape[-1])
    blanks = (best == blank) & sent(inside, best.device)
    return blanks.sum((-2, -1)), int(inside.sum())
