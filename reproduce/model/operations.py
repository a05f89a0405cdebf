"""The encoder's costly steps, written for speed and memory; values and gradients as torch's own.

B utterances, T time steps, C channels in, O channels out, F frames, H heads, D width.

What is saved for the backward pass is what can't be had again cheaply: norms, GELUs, softmaxes and
the normalized first convolution are computed anew. The convolutions here are for float32 and
float64 on the CPU, where torch's own leave a third to a half of the processor idle; elsewhere the
encoder takes torch's (`keep_convolutions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_gelu_backward = torch.ops.aten.gelu_backward


def keep_mask(shape: tuple[int, ...], rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Dropout's choice: uint8 ``shape``, 1 where kept, and the factor for what is kept.

    Drawn from the device's global stream. On the CPU four choices come from each 64-bit draw,
    which makes ``rate`` a multiple of 2^-16; the factor is that of the rate drawn.
    """
    if device.type != "cpu":
        keep = 1.0 - rate
        kept = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(keep)
        return kept.view(torch.uint8), 1.0 / keep if keep else 0.0
    levels = round((1.0 - rate) * 65536)
    if levels >= 65536 or levels <= 0:
        return torch.full(shape, int(levels > 0), dtype=torch.uint8), 1.0
    count = math.prod(shape)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[:count] < levels - 32768
    return kept.view(torch.uint8).view(shape), 65536 / levels


def dropout(values: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout that saves one byte a value."""
    if not training or rate == 0.0:
        return values
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.nn.functional.dropout(values, rate)
    dropped: Tensor = _Dropout.apply(values, rate)
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rate: float) -> Tensor:
        kept, ctx.factor = keep_mask(tuple(values.shape), rate, values.device)
        ctx.save_for_backward(kept)
        return values.mul(kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return gradient.mul(kept).mul_(ctx.factor), None


# ---------------------------------------------------------------------------------- feed-forward


def feed_forward(
    inputs: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rate: float
) -> Tensor:
    """``linear(dropout(gelu(linear(inputs))))`` of inputs [..., D], under autocast in its type.

    Saves the inputs, the first layer's outputs and a byte a value of them.

    Args:
        w1, b1, w2, b2: weights and biases of the two linear layers.
        rate: of dropout; 0 in eval mode.
    """
    if torch.compiler.is_compiling():
        hidden = torch.nn.functional.dropout(gelu(torch.nn.functional.linear(inputs, w1, b1)), rate)
        return torch.nn.functional.linear(hidden, w2, b2)
    tensors = (inputs, w1, b1, w2, b2)
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = tuple(tensor.to(dtype) for tensor in tensors)  # type: ignore[assignment]
    with torch.autocast(kind, enabled=False):
        out: Tensor = _FeedForward.apply(tensors[0].flatten(0, -2), *tensors[1:], rate)
    return out.view(*inputs.shape[:-1], len(w2))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rate: float
    ) -> Tensor:
        hidden = torch.addmm(b1, inputs, w1.t())
        active, kept, ctx.factor = gelu(hidden), None, 1.0
        if rate:
            kept, ctx.factor = keep_mask(tuple(hidden.shape), rate, hidden.device)
            active.mul_(kept)
        ctx.save_for_backward(inputs, hidden, kept, w1, w2)
        return torch.addmm(b2, active, w2.t(), alpha=ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, hidden, kept, w1, w2 = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            active = gelu(hidden)
            back = gradient @ w2
            if kept is not None:
                active.mul_(kept)
                back.mul_(kept)
            g_w2 = (gradient.t() @ active).mul_(ctx.factor)
            g_hidden = _gelu_backward(back.mul_(ctx.factor), hidden)
            g_w1 = g_hidden.t() @ inputs
            g_inputs = g_hidden @ w1 if ctx.needs_input_grad[0] else None
        return g_inputs, g_w1, g_hidden.sum(0), g_w2, gradient.sum(0), None


# ------------------------------------------------------------------------------------- attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, rate: float
) -> Tensor:
    """Scaled dot-product attention [B, H, Q, d] of queries [B, H, Q, d] over keys [B, H, F, d].

    torch's own where it doesn't write out the F x F weights (that is, but for dropout on the CPU).

    Args:
        seen: keys that take part [B, 1, 1, F] bool; None: all.
        rate: of dropout on the weights; 0 in eval mode.
    """
    if rate == 0.0 or query.device.type != "cpu" or torch.compiler.is_compiling():
        attended: Tensor = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=rate
        )
        return attended
    with torch.autocast("cpu", enabled=False):
        attended = _Attention.apply(query, key, value, seen, rate)
    return attended


class _Attention(torch.autograd.Function):
    """One utterance at a time, which fits into the cache; weights are computed anew backwards."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, rate: float
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        shape = (batch, heads, queries, key.shape[2])
        kept, ctx.factor = keep_mask(shape, rate, query.device)
        out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        for n in range(batch):
            weights = _weights(query[n], key[n], None if seen is None else seen[n])
            out[n] = weights.mul_(kept[n]) @ value[n]
        ctx.save_for_backward(query, key, value, seen, kept)
        return out.mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, seen, kept = ctx.saved_tensors
        scale = query.shape[3] ** -0.5
        with torch.autocast("cpu", enabled=False):
            gradient = gradient * ctx.factor
            g_query, g_key, g_value = (torch.empty_like(t) for t in (query, key, value))
            for n in range(len(query)):
                weights = _weights(query[n], key[n], None if seen is None else seen[n])
                g_value[n] = (weights * kept[n]).transpose(1, 2) @ gradient[n]
                g_weights = (gradient[n] @ value[n].transpose(1, 2)).mul_(kept[n])
                g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype)
                g_query[n] = (g_scores @ key[n]).mul_(scale)
                g_key[n] = (g_scores.transpose(1, 2) @ query[n]).mul_(scale)
        return g_query, g_key, g_value, None, None


def _weights(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax over keys [H, Q, F]; an utterance that sees no key sees all alike."""
    scores: Tensor = (query * query.shape[2] ** -0.5) @ key.transpose(1, 2)
    if seen is not None:
        scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


# ---------------------------------------------------------------------------------- convolutions


def has_own_convolutions(waveform: Tensor) -> bool:
    """Whether `convolve` and what follows it take these samples."""
    return (
        waveform.device.type == "cpu"
        and waveform.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not waveform.requires_grad
    )


def keep_convolutions(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, of which the backward pass computes all but convolutions anew.

    Of norm, GELU and convolution in a row, the inputs alone are then saved: under CUDA's autocast,
    where norm and GELU are in float32, less than a third. For functions without random numbers.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    out: Tensor = checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _convolutions_alone),
    )
    return out


def _convolutions_alone(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    if operation is torch.ops.aten.convolution.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def own_group_norm(
    values: Tensor, steps: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Group norm with one channel a group over each utterance's own time steps.

    In float32, float64 stays, under autocast too.

    Args:
        values: [B, C, T]; what lies behind an utterance's own steps counts for nothing.
        steps: own time steps of each utterance [B], on the device of the values.
        weight, bias: [C].
    """
    with torch.autocast(values.device.type, enabled=False):
        wide = values if values.dtype == torch.float64 else values.float()
        inside = (torch.arange(values.shape[2], device=values.device) < steps[:, None])[:, None]
        count = steps.clamp(min=1)[:, None, None]
        mean = torch.where(inside, wide, 0.0).sum(-1, keepdim=True) / count
        centred = torch.where(inside, wide - mean, 0.0)
        variance = centred.square().sum(-1, keepdim=True) / count
        scale = (variance + eps).rsqrt() * weight[:, None]
        return torch.addcmul(bias[:, None], centred, scale)


def convolve(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *, activate: bool
) -> Tensor:
    """Convolution over time, channels last: [B, T, C] -> [B, (T - k) // stride + 1, O].

    k taps with stride s are ceil(k/s) matrix products of strided views of the inputs, so nothing is
    unfolded. Saves the inputs alone.

    Args:
        weight: [O, C, k].
        bias: [O] or None.
        activate: apply GELU to the inputs first.

    Raises:
        ValueError: fewer inputs than taps.
    """
    taps = weight.shape[2]
    if inputs.shape[1] < taps:
        raise ValueError(f"{inputs.shape[1]} time steps are fewer than the kernel's {taps}")
    out: Tensor = _Convolve.apply(inputs.contiguous(), weight, bias, stride, activate)
    return out


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activate: bool
    ) -> Tensor:
        ctx.stride, ctx.activate, ctx.biased = stride, activate, bias is not None
        ctx.save_for_backward(inputs, weight)
        rows = (inputs.shape[1] - weight.shape[2]) // stride + 1
        out = inputs.new_empty(len(inputs), rows, len(weight))
        matrix = _as_matrix(weight)
        active = torch.empty_like(inputs[0]) if activate else None
        for values, result in zip(inputs, out, strict=True):
            if active is not None:
                values = torch.ops.aten.gelu.out(values, out=active)
            for first, window, part in _windows(values, matrix, stride, rows):
                if first:
                    torch.mm(window, part, out=result)
                else:
                    result.addmm_(window, part)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        stride, rows = ctx.stride, gradient.shape[1]
        gradient = gradient.contiguous()
        matrix = _as_matrix(weight)
        g_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        g_inputs = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        for n, (values, received) in enumerate(zip(inputs, gradient, strict=True)):
            if g_matrix is not None:
                active = gelu(values) if ctx.activate else values
                for (_, window, _), (_, _, part) in zip(
                    _windows(active, matrix, stride, rows),
                    _windows(active, g_matrix, stride, rows),
                    strict=True,
                ):
                    part.addmm_(window.t(), received)
            if g_inputs is not None:
                back = g_inputs[n]
                back[_covered(weight.shape[2], stride, rows) :] = 0.0
                if weight.shape[2] < stride:
                    back.zero_()
                for first, window, part in _windows(back, matrix, stride, rows):
                    if first:
                        torch.mm(received, part.t(), out=window)
                    else:
                        window.addmm_(received, part.t())
                if ctx.activate:
                    torch.ops.aten.gelu_backward.grad_input(back, values, grad_input=back)
        g_weight = None
        if g_matrix is not None:
            taps = weight.shape[2]
            g_weight = g_matrix.view(taps, -1, len(weight)).permute(2, 1, 0).contiguous()
        g_bias = gradient.sum((0, 1)) if ctx.biased else None
        return g_inputs, g_weight, g_bias, None, None


def _as_matrix(weight: Tensor) -> Tensor:
    """[O, C, k] -> [k C, O]."""
    return weight.detach().permute(2, 1, 0).reshape(-1, len(weight))


def _covered(taps: int, stride: int, rows: int) -> int:
    """Time steps that the first product of `_windows` writes without a gap."""
    return rows * stride if taps >= stride else 0


def _windows(
    values: Tensor, matrix: Tensor, stride: int, rows: int
) -> list[tuple[bool, Tensor, Tensor]]:
    """(whether first, [rows, taps C] of values [T, C], the same taps of matrix [k C, O])."""
    channels = values.shape[1]
    taps = len(matrix) // channels
    found = []
    for start in range(0, taps, stride):
        count = min(stride, taps - start)
        window = values.as_strided(
            (rows, count * channels),
            (stride * channels, 1),
            values.storage_offset() + start * channels,
        )
        part = matrix[start * channels : (start + count) * channels]
        found.append((start == 0, window, part))
    return found


def normalized_convolution(
    waveform: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, stride: int
) -> Tensor:
    """The first convolution with its group norm: waveform [B, T] -> [B, rows, O].

    With one group a channel and one input channel, the outputs' mean and variance follow from those
    of the k-sample windows: ``mean = w . m`` and ``var = w' S w`` with their mean m and covariance
    S [k, k]. So neither forwards nor backwards is the unnormalized output needed. A bias of the
    convolution would cancel.

    Args:
        weight: [O, 1, k].
        scale, shift: of the group norm [O].
        eps: of the group norm.
    """
    out: Tensor = _NormalizedConvolution.apply(waveform, weight, scale, shift, eps, stride)
    return out


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        waveform: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        stride: int,
    ) -> Tensor:
        ctx.eps, ctx.stride = eps, stride
        ctx.save_for_backward(waveform, weight, scale)
        rows = (waveform.shape[1] - weight.shape[2]) // stride + 1
        out = waveform.new_empty(len(waveform), rows, len(weight))
        for samples, result in zip(waveform, out, strict=True):
            windows, _, inverse = _statistics(samples, weight, eps, stride)
            matrix = (weight[:, 0].double() * (scale * inverse)[:, None]).to(weight.dtype)
            torch.addmm(shift, windows, matrix.t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        waveform, weight, scale = ctx.saved_tensors
        kernel, scales = weight[:, 0].double(), scale.double()
        g_kernel, g_scale = torch.zeros_like(kernel), torch.zeros_like(scales)
        for samples, received in zip(waveform, gradient, strict=True):
            windows, covariance, inverse = _statistics(samples, weight, ctx.eps, ctx.stride)
            sums = (received.t() @ windows).double()  # [O, k]
            own = inverse * (kernel * sums).sum(1)
            g_scale += own
            g_kernel += (scales * inverse)[:, None] * (
                sums - (own * inverse)[:, None] * (kernel @ covariance)
            )
        dtype = weight.dtype
        g_shift = gradient.sum((0, 1))
        return None, g_kernel[:, None].to(dtype), g_scale.to(dtype), g_shift, None, None


def _statistics(
    samples: Tensor, weight: Tensor, eps: float, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Centred windows [rows, k]; in double their covariance [k, k] and 1/std of the outputs [O]."""
    windows = samples.unfold(0, weight.shape[2], stride).double()
    windows = windows - windows.mean(0)
    covariance = windows.t() @ windows / len(windows)
    kernel = weight[:, 0].double()
    inverse = (((kernel @ covariance) * kernel).sum(1) + eps).rsqrt()
    return windows.to(samples.dtype), covariance, inverse


def convolve_by_fft(inputs: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Grouped convolution with stride 1 that keeps the length: [B, T, D] -> [B, T, D].

    Overlap-save in blocks of two kernels. Padding is k // 2 on the left, and with even k one less
    on the right.

    Args:
        weight: [D, D/groups, k].
    """
    batch, total, _ = inputs.shape
    outputs, channels, taps = weight.shape
    size = 2 * taps
    step = size - taps + 1
    blocks = -(-total // step)
    padded = pad(inputs, (0, 0, taps // 2, blocks * step + taps - 1 - taps // 2 - total))
    spectrum = torch.fft.rfft(_Blocks.apply(padded, size, step))  # [B, blocks, D, bins]
    bins = spectrum.shape[-1]
    spectrum = spectrum.reshape(batch * blocks, groups, channels, bins).permute(1, 3, 0, 2)
    kernel = torch.fft.rfft(weight, size).view(groups, outputs // groups, channels, bins)
    product = spectrum.contiguous() @ kernel.permute(0, 3, 2, 1).conj()
    result: Tensor = torch.fft.irfft(product.permute(2, 0, 3, 1), size)[..., :step]
    result = result.reshape(batch, blocks, outputs, step).transpose(2, 3)
    return result.reshape(batch, blocks * step, outputs)[:, :total] + bias


class _Blocks(torch.autograd.Function):
    """``values.unfold(1, size, step)``: [B, T, D] -> [B, blocks, D, size].

    Backwards it adds up whole blocks, in torch's order, where torch goes value by value.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, size: int, step: int) -> Tensor:
        ctx.shape, ctx.size, ctx.step = values.shape, size, step
        return values.unfold(1, size, step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        back = gradient.new_zeros(ctx.shape)
        for number, part in enumerate(gradient.unbind(1)):
            start = number * ctx.step
            back[:, start : start + ctx.size] += part.transpose(1, 2)
        return back, None, None
