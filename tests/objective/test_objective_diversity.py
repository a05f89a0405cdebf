from __future__ import annotations

import math

import pytest
import torch

from reproduce.objective.diversity import diversity, perplexity


def test_uniform_use_costs_nothing() -> None:
    even = torch.full((3, 40), 1 / 40)
    assert diversity(even, "entropy").item() == pytest.approx(0.0, abs=1e-6)
    assert diversity(even, "perplexity").item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(perplexity(even), torch.full((3,), 40.0))


def test_a_single_entry_in_use() -> None:
    one = torch.zeros(3, 40)
    one[:, 7] = 1.0
    assert diversity(one, "entropy").item() == pytest.approx(1.0)
    assert diversity(one, "perplexity").item() == pytest.approx(39 / 40)
    torch.testing.assert_close(perplexity(one), torch.ones(3))


def test_both_forms_are_the_written_sums() -> None:
    use = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    entropies = [-sum(p * math.log(p) for p in row) for row in use.tolist()]
    entropy_form = sum(1 - h / math.log(9) for h in entropies) / 4
    perplexity_form = (4 * 9 - sum(math.exp(h) for h in entropies)) / (4 * 9)
    assert diversity(use, "entropy").item() == pytest.approx(entropy_form, rel=1e-5)
    assert diversity(use, "perplexity").item() == pytest.approx(perplexity_form, rel=1e-5)


def test_unused_entries_have_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -200.0]], requires_grad=True)
    diversity(logits.softmax(dim=-1), "entropy").backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="entropy or perplexity"):
        diversity(torch.full((1, 2), 0.5), "gini")  # type: ignore[arg-type]
