"""A choice of frames in a batch, and its indices: made where the mask is, sent to where it's used.

B utterances, F frames, N chosen frames, Q most of them in one utterance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; between the CPU and a GPU by a copy that nobody waits for.

    That takes pinned memory: from any other the host waits until the GPU has come to the copy.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def valid_frames(lengths: Tensor, total: int) -> Tensor:
    """Which of F frames are an utterance's own: lengths [B] -> [B, F] bool, on the same device."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


class Frames:
    """The true places of a mask, in row-major order.

    Made from a mask on the CPU, no index waits for an accelerator.

    Args:
        where: chosen frames [B, F] bool.
        device: of the values to choose from; None: that of ``where``.
    """

    def __init__(self, where: Tensor, device: torch.device | None = None) -> None:
        self.where = where
        self.device = where.device if device is None else device
        self.rows, self.frames = where.nonzero(as_tuple=True)  # [N] each
        self.per_utterance = where.sum(dim=1)  # [B]
        self.first = self.per_utterance.cumsum(0) - self.per_utterance  # [B]
        self.order = torch.arange(len(self.rows), device=where.device) - self.first[self.rows]
        self.most = int(self.per_utterance.max()) if len(where) else 0
        self.places = self.sent(self.rows * where.shape[1] + self.frames)  # [N] among all B F
        self.slots = self.sent(self.rows * self.most + self.order)  # [N] among the B Q of `spread`

    def __len__(self) -> int:
        return len(self.rows)

    def sent(self, index: Tensor) -> Tensor:
        """An index on the values' device, which nobody waits for."""
        return sent(index, self.device)

    def pick(self, values: Tensor) -> Tensor:
        """[B, F, D] -> [N, D]."""
        return values.flatten(0, 1).index_select(0, self.places)

    def put(self, values: Tensor, fill: int) -> Tensor:
        """[N, D] -> [B, F, D], the inverse of `pick`, with ``fill`` elsewhere."""
        full = values.new_full((self.where.numel(), values.shape[1]), fill)
        return full.index_copy_(0, self.places, values).view(*self.where.shape, values.shape[1])

    def spread(self, values: Tensor) -> Tensor:
        """[N, D] -> [B, Q, D], zeros behind each utterance's frames."""
        padded = values.new_zeros(len(self.where) * self.most, values.shape[1])
        return padded.index_copy(0, self.slots, values).view(
            len(self.where), self.most, values.shape[1]
        )

    def gather(self, values: Tensor) -> Tensor:
        """[B, Q, D] -> [N, D], the inverse of `spread`."""
        return values.flatten(0, 1).index_select(0, self.slots)
