"""Connectionist temporal classification (Graves et al. 2006), summed, and greedy decoding.

Letters: B batch, F frames, V tokens, S longest target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class CtcTerms:
    """A micro-batch's part of the loss.

    Attributes:
        loss: scalar, nats: sum over utterances of the CTC loss / target length. Divided by
            ``utterances`` it is what ``torch.nn.CTCLoss(reduction="mean")`` returns.
        utterances: B, the zeroed ones included (as torch's mean does).
        zeroed: scalar int64, utterances without any alignment: they add zero, and no gradient.
    """

    loss: Tensor
    utterances: int
    zeroed: Tensor


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

    Args:
        targets: [B, S] int64, padded with anything, or all targets concatenated in one dimension.
        input_lengths: [B] frames.
        target_lengths: [B] tokens.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        device = logits.device
        lengths, sizes = input_lengths.to(device), target_lengths.to(device)
        if targets.ndim == 1:
            targets = pad_sequence(
                list(torch.split(targets, target_lengths.tolist())), batch_first=True
            )
        targets = targets.to(device)
        possible = required_frames(targets, sizes) <= lengths
        losses = F.ctc_loss(
            wide.log_softmax(-1).transpose(0, 1),
            targets,
            lengths,
            torch.where(possible, sizes, 0),  # a finite stand-in, cancelled below
            blank=blank,
            reduction="none",
        )
        loss = (losses * possible / sizes.clamp(min=1)).sum()
    return CtcTerms(loss, len(logits), (~possible).sum())


def required_frames(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Fewest frames [B] that can hold targets [B, S]: tokens plus immediate repetitions."""
    repeats = targets[:, 1:] == targets[:, :-1]
    second = torch.arange(repeats.shape[1], device=targets.device) + 1
    return target_lengths + (repeats & (second < target_lengths.unsqueeze(-1))).sum(-1)


def greedy_decode(logits: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """The likeliest token of each frame of logits [B, F, V], repeats collapsed, blanks dropped."""
    best = logits.argmax(-1).cpu()
    return [
        [token for token in row[:length].unique_consecutive().tolist() if token != blank]
        for row, length in zip(best, lengths.tolist())
    ]


def blank_frames(logits: Tensor, lengths: Tensor, blank: int = 0) -> tuple[Tensor, Tensor]:
    """(frames whose likeliest token is blank, frames): sums whose ratio is the blank rate.

    int64 scalars on the logits' device, which needn't be waited for.
    """
    frames = torch.arange(logits.shape[1], device=logits.device)
    inside = frames < lengths.to(logits.device).unsqueeze(-1)
    blanks = (logits.argmax(-1) == blank) & inside
    return blanks.sum(), inside.sum()
