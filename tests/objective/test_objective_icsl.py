from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reproduce.objective.icsl import IcslForm, codebook_similarity, icsl


def slow(codebooks: Tensor, form: str, pairs: str) -> Tensor:
    """Every pair of codebooks, every pair of rows."""
    count = len(codebooks)
    total = torch.zeros((), dtype=codebooks.dtype)
    for i, j in itertools.combinations(range(count), 2):
        cosines = [torch.cosine_similarity(a, b, dim=0) for a in codebooks[i] for b in codebooks[j]]
        stacked = torch.stack(cosines)
        total = total + (stacked if form == "signed" else stacked**2).mean()
    return total / (count * (count - 1)) * (2 if pairs == "mean" else 1)


@pytest.mark.parametrize("pairs", ["mean", "paper"])
@pytest.mark.parametrize("form", ["signed", "squared"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_is_the_double_loop(count: int, form: IcslForm, pairs: str) -> None:
    generator = torch.Generator().manual_seed(count)
    codebooks = torch.rand(count, 6, 4, generator=generator, dtype=torch.float64)
    codebooks.requires_grad_()
    fast, obvious = icsl(codebooks, form, pairs), slow(codebooks, form, pairs)  # type: ignore[arg-type]
    torch.testing.assert_close(fast, obvious)
    torch.testing.assert_close(*(torch.autograd.grad(v, codebooks)[0] for v in (fast, obvious)))


def test_uniform_codevectors_start_near_three_quarters() -> None:
    """The study's logs: 0.7515 for 8 codebooks of 320 x 32 drawn from U(0, 1)."""
    codebooks = torch.rand(8, 320, 32, generator=torch.Generator().manual_seed(0))
    assert icsl(codebooks).item() == pytest.approx(0.7515, abs=0.01)


def test_signed_form_cannot_see_what_squared_sees() -> None:
    half = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0))
    balanced = torch.cat([half, -half], dim=1).repeat(2, 1, 1)  # twice the same, mean zero
    assert icsl(balanced).item() == pytest.approx(0.0, abs=1e-6)
    assert icsl(balanced, "squared").item() > 0.1


@pytest.mark.parametrize("form", ["signed", "squared"])
def test_a_single_codebook_has_no_pair(form: IcslForm) -> None:
    codebooks = torch.rand(1, 6, 4, requires_grad=True)
    loss = icsl(codebooks, form)
    loss.backward()
    assert loss.item() == 0.0
    assert codebooks.grad is not None
    assert not codebooks.grad.any()


def test_pair_table() -> None:
    codebooks = torch.rand(3, 6, 4, requires_grad=True)
    table = codebook_similarity(codebooks)
    assert not table.requires_grad
    mean = (table[0, 1] + table[0, 2] + table[1, 2]) / 3
    torch.testing.assert_close(mean, icsl(codebooks).detach())
    with pytest.raises(ValueError, match="signed or squared"):
        codebook_similarity(codebooks, "cubed")  # type: ignore[arg-type]
