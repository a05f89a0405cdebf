"""How both training stages go through a validation set: in batches, over ranks, read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from reproduce.data.batches import prefetch
from reproduce.recipe.schema import Compute
from reproduce.training.distributed import Ranks

Made = TypeVar("Made")
Part = TypeVar("Part")


def over_batches(
    utterances: int,
    size: int,
    ranks: Ranks,
    make: Callable[[int, list[int]], Made],
    use: Callable[[Made], Part],
    compute: Compute,
) -> list[Part]:
    """What each batch of a validation set gives, in batch order, on every rank.

    Args:
        utterances: in the set; batches are cut in its order, the same for any number of ranks.
        size: utterances a batch.
        ranks: each takes its share of the batches.
        make: batch number and positions -> a batch; in a thread while the one before is used.
        use: a batch -> its part.
        compute: says how many batches are read ahead, and by how many threads.
    """
    batches = [list(range(i, min(i + size, utterances))) for i in range(0, utterances, size)]
    mine = ranks.mine(batches)
    made = prefetch(
        lambda k: make(*mine[k]),
        0,
        len(mine) - 1,
        ahead=compute.prefetch,
        readers=compute.readers,
    )
    own = [(number, use(given)) for (number, _), given in zip(mine, made, strict=True)]
    parts = sorted((p for part in ranks.gather(own) for p in part), key=lambda p: p[0])
    return [part for _, part in parts]


def on_the_host(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the CPU; a GPU is waited for once."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies
