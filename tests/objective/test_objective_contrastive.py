"""Contrastive loss: the slow obvious version here, the fast one in the code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reproduce.objective.contrastive import Comparison, code_identity, contrastive, info_nce
from reproduce.objective.frames import Frames

TEMPERATURE = 0.1


def slow(
    predictions: Tensor,
    targets: Tensor,
    codes: Tensor,
    negatives: Tensor,
    mask: Tensor,
    quantized: Tensor,
    remove: bool,
) -> tuple[Tensor, float, int]:
    """One masked frame after the other."""
    index = {tuple(where): n for n, where in enumerate(quantized.nonzero().tolist())}
    loss, chance, kept = torch.zeros(()), 0.0, 0
    for n, (row, frame) in enumerate(mask.nonzero().tolist()):
        own = index[row, frame]
        others = [index[row, other] for other in negatives[n].tolist()]
        if remove:
            others = [other for other in others if not torch.equal(codes[other], codes[own])]
        logits = torch.stack(
            [
                torch.cosine_similarity(predictions[n], targets[m], dim=0) / TEMPERATURE
                for m in [own, *others]
            ]
        )
        loss = loss - logits.log_softmax(0)[0]
        chance += math.log(1 + len(others))
        kept += len(others)
    return loss, chance, kept


def example(generator: torch.Generator, extra: bool) -> dict[str, Tensor]:
    mask = torch.rand(4, 11, generator=generator) < 0.5
    mask[2] = False  # an utterance that takes no part
    quantized = mask | (torch.rand(4, 11, generator=generator) < 0.3) if extra else mask
    rows = mask.nonzero()[:, 0].tolist()
    negatives = []
    for row in rows:
        frames = quantized[row].nonzero()[:, 0]
        negatives.append(frames[torch.randint(len(frames), (7,), generator=generator)])
    count = int(quantized.sum())
    return {
        "predictions": torch.randn(len(rows), 5, generator=generator).requires_grad_(),
        "targets": torch.randn(count, 5, generator=generator).requires_grad_(),
        "codes": torch.randint(2, (count, 3), generator=generator),
        "negatives": torch.stack(negatives),
        "mask": mask,
        "quantized": quantized,
    }


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_slow_loop(seed: int, extra: bool, remove: bool) -> None:
    inputs = example(torch.Generator().manual_seed(seed), extra)
    terms = contrastive(
        inputs["predictions"],
        inputs["targets"],
        inputs["codes"],
        Comparison(Frames(inputs["mask"]), Frames(inputs["quantized"]), inputs["negatives"]),
        entries=2,
        temperature=TEMPERATURE,
        remove_collisions=remove,
    )
    loss, chance, kept = slow(**inputs, remove=remove)
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms.chance.item() == pytest.approx(chance, rel=1e-5)
    assert (int(terms.kept), terms.count) == (kept, int(inputs["mask"].sum()))
    leaves = [inputs["predictions"], inputs["targets"]]
    for fast, obvious in zip(
        torch.autograd.grad(terms.loss, leaves), torch.autograd.grad(loss, leaves), strict=True
    ):
        torch.testing.assert_close(fast, obvious, rtol=1e-4, atol=1e-5)


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    removed = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    terms = info_nce(torch.zeros(6), torch.zeros(6, 10), removed)
    assert terms.loss.item() == pytest.approx(terms.chance.item(), rel=1e-6)
    assert int(terms.kept) == int((~removed).sum())
    assert info_nce(torch.zeros(6), torch.zeros(6, 100)).chance.item() == pytest.approx(
        6 * math.log(101), rel=1e-6
    )


def test_all_negatives_removed_costs_nothing_and_has_no_nan() -> None:
    negatives = torch.randn(2, 3, requires_grad=True)
    positive = torch.randn(2, requires_grad=True)
    terms = info_nce(positive, negatives, torch.ones(2, 3, dtype=torch.bool))
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert terms.chance.item() == 0.0
    assert negatives.grad is not None
    assert not negatives.grad.any()


def test_no_masked_frame_gives_zero_with_a_graph() -> None:
    predictions = torch.zeros(0, 5, requires_grad=True)
    nothing = Frames(torch.zeros(2, 8, dtype=torch.bool))
    terms = contrastive(
        predictions,
        torch.zeros(0, 5),
        torch.zeros(0, 2, dtype=torch.int64),
        Comparison(nothing, nothing, torch.zeros(0, 4, dtype=torch.int64)),
        entries=3,
    )
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert terms.count == 0


@pytest.mark.parametrize("entries", [2, 320, 70_000])
@pytest.mark.parametrize("codebooks", [1, 2, 16, 32])
def test_code_identity(codebooks: int, entries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = entries - 1 - torch.randint(2, (60, codebooks), generator=generator)
    codes[30:] = codes[:30]
    identity = code_identity(codes, entries)
    same = (codes[:, None] == codes[None]).all(dim=-1)
    assert torch.equal((identity[:, None] == identity[None]).all(dim=-1), same)
