from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from reproduce.model.quantizer import GumbelQuantizer, gumbel_noise


def quantizer(codebooks: int = 4, entries: int = 7, **options: object) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(10, codebooks, entries, 32, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("codebooks", [1, 2, 8, 32])
def test_codevectors_are_the_chosen_entries(codebooks: int, train: bool) -> None:
    module = quantizer(codebooks).train(train)
    out = module(torch.randn(50, 10), 0.7)
    assert out.codes.shape == (50, codebooks)
    entries = module.codebooks()
    looked_up = torch.cat([entries[g][out.codes[:, g]] for g in range(codebooks)], dim=1)
    assert torch.equal(out.codevectors, looked_up)


def test_eval_takes_the_largest_logit_and_counts_codes() -> None:
    module = quantizer().eval()
    inputs = torch.randn(60, 10)
    counted = torch.arange(60) < 45
    out = module(inputs, counted=counted)
    logits = module.weight_proj(inputs).view(60, 4, 7)
    assert torch.equal(out.codes, logits.argmax(-1))
    expected = one_hot(out.codes[counted], 7).float().mean(dim=0)
    torch.testing.assert_close(out.mean_probabilities, expected)


def test_train_samples_with_the_noise_and_counts_without_it() -> None:
    module = quantizer().train()
    inputs, noise = torch.randn(60, 10), torch.randn(60, 4, 7)
    counted = torch.arange(60) % 3 > 0
    out = module(inputs, 0.5, noise=noise, counted=counted)
    logits = module.weight_proj(inputs).view(60, 4, 7)
    assert torch.equal(out.codes, (logits + noise).argmax(-1))
    expected = logits.softmax(-1)[counted].mean(dim=0)
    torch.testing.assert_close(out.mean_probabilities, expected)


def test_straight_through_gradient_is_that_of_the_soft_choice() -> None:
    module = quantizer().double().train()
    inputs, noise = torch.randn(20, 10).double(), torch.randn(20, 4, 7).double()
    weights = torch.randn(20, 32).double()
    out = module(inputs, 0.5, noise=noise)
    (gradient,) = torch.autograd.grad((out.codevectors * weights).sum(), module.weight_proj.weight)
    soft = ((module.weight_proj(inputs).view(20, 4, 7) + noise) / 0.5).softmax(-1)
    mixed = torch.einsum("ngv,gvd->ngd", soft, module.codebooks()).flatten(1)
    (expected,) = torch.autograd.grad((mixed * weights).sum(), module.weight_proj.weight)
    torch.testing.assert_close(gradient, expected)


def test_noise_from_its_own_generator_leaves_the_global_stream_alone() -> None:
    module = quantizer().train()
    inputs = torch.randn(20, 10)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        codes = module(inputs, 2.0, generator=torch.Generator().manual_seed(seed)).codes
        draws.append((codes, torch.rand(3)))
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert torch.equal(draws[0][1], draws[2][1])


def test_gumbel_noise_is_finite_and_standard() -> None:
    noise = gumbel_noise(torch.empty(4_000_000), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)


def test_stays_in_float32_under_autocast() -> None:
    module = quantizer().eval()
    inputs = torch.randn(30, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(inputs)
    assert out.codevectors.dtype == torch.float32
    assert torch.equal(out.codes, module(inputs).codes)


def test_initial_codevectors() -> None:
    uniform = quantizer(2, 320).codevectors
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() <= 1
    normal = quantizer(2, 320, init="normal").codevectors
    assert normal.mean().item() == pytest.approx(0.0, abs=0.05)
    assert normal.std().item() == pytest.approx(1.0, abs=0.05)


def test_no_frames() -> None:
    for train in (True, False):
        out = quantizer().train(train)(torch.zeros(0, 10))
        assert out.codevectors.shape == (0, 32)
        assert not out.mean_probabilities.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 7, 32), "0 codebooks"),
        ((10, 33, 7, 66), "33 codebooks"),
        ((10, 3, 7, 32), "isn't a multiple of 3"),
        ((10, 2, 1, 32), "1 entries"),
    ],
)
def test_impossible_shapes(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GumbelQuantizer(*arguments)


def test_noise_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match="Gumbel noise"):
        quantizer().train()(torch.zeros(5, 10), noise=torch.zeros(4, 4, 7))
