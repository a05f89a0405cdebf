"""Each operation beside the obvious one, values and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, gelu, group_norm, linear

from reproduce.model import operations
from reproduce.model.operations import keep_mask


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def assert_alike(
    ours: Callable[..., Tensor], obvious: Callable[..., Tensor], leaves: list[Tensor]
) -> None:
    left, right = ours(), obvious()
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(right)
    for a, b in zip(
        torch.autograd.grad((left * weights).sum(), leaves),
        torch.autograd.grad((right * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("taps", "stride", "total"),
    [(10, 5, 64), (3, 2, 31), (3, 2, 32), (2, 2, 9), (1, 3, 8), (7, 2, 7)],
)
def test_convolution(taps: int, stride: int, total: int, biased: bool, activate: bool) -> None:
    inputs, weight = leaf(2, total, 3), leaf(5, 3, taps)
    bias = leaf(5) if biased else None

    def obvious() -> Tensor:
        active = gelu(inputs) if activate else inputs
        return conv1d(active.transpose(1, 2), weight, bias, stride).transpose(1, 2)

    assert_alike(
        lambda: operations.convolve(inputs, weight, bias, stride, activate=activate),
        obvious,
        [inputs, weight] + ([bias] if bias is not None else []),
    )


def test_a_frozen_convolution_and_one_without_input_gradient() -> None:
    inputs, weight = leaf(1, 9, 2), leaf(4, 2, 3)
    for a, b, wanted in (
        (inputs, weight.detach(), inputs),
        (inputs.detach(), weight, weight),
    ):
        out = operations.convolve(a, b, None, 2, activate=True)
        expected = conv1d(gelu(a).transpose(1, 2), b, stride=2).transpose(1, 2)
        for left, right in zip(
            torch.autograd.grad(out.sum(), wanted),
            torch.autograd.grad(expected.sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(left, right)


def test_too_short_for_the_kernel() -> None:
    with pytest.raises(ValueError, match="fewer than the kernel's 10"):
        operations.convolve(torch.randn(1, 9, 1), leaf(4, 1, 10), None, 5, activate=False)


def test_normalized_convolution() -> None:
    waveform = torch.randn(3, 200) + 0.7
    waveform[1, 150:] = 0.0
    weight, scale, shift = leaf(6, 1, 10), leaf(6), leaf(6)
    assert_alike(
        lambda: operations.normalized_convolution(waveform, weight, scale, shift, 1e-5, 5),
        lambda: group_norm(
            conv1d(waveform[:, None], weight, stride=5), 6, scale, shift, 1e-5
        ).transpose(1, 2),
        [weight, scale, shift],
    )


def test_normalized_convolution_of_silence() -> None:
    leaves = [leaf(6, 1, 10), leaf(6), leaf(6)]
    out = operations.normalized_convolution(torch.zeros(1, 100), *leaves, 1e-5, 5)
    assert torch.equal(out, leaves[2].expand_as(out))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("total", [1, 7, 40])
@pytest.mark.parametrize("taps", [4, 5, 16])
def test_convolution_by_fft(taps: int, total: int) -> None:
    inputs, weight, bias = leaf(2, total, 6), leaf(6, 3, taps), leaf(6)

    def obvious() -> Tensor:
        out = conv1d(inputs.transpose(1, 2), weight, bias, padding=taps // 2, groups=2)
        return out[..., :total].transpose(1, 2)

    assert_alike(
        lambda: operations.convolve_by_fft(inputs, weight, bias, 2),
        obvious,
        [inputs, weight, bias],
    )


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_feed_forward(rate: float) -> None:
    inputs, w1, b1, w2, b2 = leaf(2, 7, 4), leaf(9, 4), leaf(9), leaf(4, 9), leaf(4)

    def obvious() -> Tensor:
        hidden = gelu(linear(inputs, w1, b1))
        if rate:
            torch.manual_seed(1)
            kept, factor = keep_mask((14, 9), rate, torch.device("cpu"))
            hidden = hidden * kept.view(2, 7, 9) * factor
        return linear(hidden, w2, b2)

    def ours() -> Tensor:
        torch.manual_seed(1)
        return operations.feed_forward(inputs, w1, b1, w2, b2, rate)

    assert_alike(ours, obvious, [inputs, w1, b1, w2, b2])


@pytest.mark.parametrize("padded", [True, False])
def test_attention(padded: bool) -> None:
    query, key, value = leaf(2, 3, 4, 5), leaf(2, 3, 8, 5), leaf(2, 3, 8, 5)
    seen = torch.arange(8) < torch.tensor([8, 3])[:, None] if padded else None
    seen = seen[:, None, None] if seen is not None else None

    def obvious() -> Tensor:
        torch.manual_seed(1)
        kept, factor = keep_mask((2, 3, 4, 8), 0.25, torch.device("cpu"))
        scores = query @ key.transpose(2, 3) / 5**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) * kept * factor) @ value

    def ours() -> Tensor:
        torch.manual_seed(1)
        return operations.attention(query, key, value, seen, 0.25)

    assert_alike(ours, obvious, [query, key, value])
    torch.testing.assert_close(
        operations.attention(query, key, value, seen, 0.0),
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen),
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_mean(rate: float) -> None:
    kept, factor = keep_mask((1_000_001,), rate, torch.device("cpu"))
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=0.002)
    assert factor == pytest.approx(1 / (1 - rate), rel=1e-4)
    # neighbours, which come from one draw, are independent
    pairs = (kept[:-1] & kept[1:]).double().mean().item()
    assert pairs == pytest.approx((1 - rate) ** 2, abs=0.003)


def test_dropout() -> None:
    values = leaf(50, 40)
    assert operations.dropout(values, 0.5, False) is values
    assert operations.dropout(values, 0.0, True) is values
    out = operations.dropout(values, 0.5, True)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert set(gradient.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(out, values * gradient)
    assert not operations.dropout(values, 1.0, True).any()


def test_random_streams_follow_torchs() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(keep_mask((100,), 0.5, torch.device("cpu"))[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
