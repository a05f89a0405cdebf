from __future__ import annotations

import torch

from reproduce.objective.frames import Frames


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    where = torch.rand(4, 9, generator=generator) < 0.4
    where[2] = False
    return where, torch.randn(4, 9, 3, generator=generator)


def test_pick_is_indexing_by_the_mask() -> None:
    where, values = example()
    frames = Frames(where)
    assert torch.equal(frames.pick(values), values[where])
    assert len(frames) == int(where.sum())
    assert frames.most == int(where.sum(dim=1).max())


def test_spread_puts_each_utterance_into_its_row_and_gather_takes_it_back() -> None:
    where, values = example()
    frames = Frames(where)
    spread = frames.spread(values[where])
    for row in range(4):
        own = values[row][where[row]]
        assert torch.equal(spread[row, : len(own)], own)
        assert not spread[row, len(own) :].any()
    assert torch.equal(frames.gather(spread), values[where])


def test_nothing_chosen() -> None:
    frames = Frames(torch.zeros(2, 5, dtype=torch.bool))
    assert len(frames) == frames.most == 0
    assert frames.spread(frames.pick(torch.ones(2, 5, 3))).shape == (2, 0, 3)
