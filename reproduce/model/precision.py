"""How exactly products are computed, in one place: float32, TF32 or bf16, and full float32 inside.

TF32 is switched by ``fp32_precision`` alone, torch's newer interface. torch then refuses to answer
what the older ``allow_tf32`` flags say where these differ from it; nothing here asks, and of torch
itself ``cudnn.flags`` and, in products, tunable operations (``PYTORCH_TUNABLEOP_ENABLED``) do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16"]

PRODUCTS: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn
CONVOLUTIONS: tuple[Any, ...] = (_CUDNN.conv, _CUDNN.rnn)
"""cuDNN's, which go together: torch refuses to answer for cuDNN where they differ."""


def set_precision(precision: Precision) -> None:
    """What this process's GPUs may make of float32: TF32, unless ``float32`` is asked for.

    (bf16 is autocast's, see `reproduce.tasks.wiring.autocast`; what it leaves in float32 may then
    be TF32.)
    """
    for switch in (PRODUCTS, *CONVOLUTIONS):
        switch.fp32_precision = "ieee" if precision == "float32" else "tf32"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 in products: for what chooses codes, adds up or compares.

    For what is computed inside. Autograd's own products for it come later, in the backward pass,
    with the precision that is set there: where gradients are wanted, see `exactly`.
    """
    allowed = PRODUCTS.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if allowed != "tf32":
            yield
            return
        PRODUCTS.fp32_precision = "ieee"
        try:
            yield
        finally:
            PRODUCTS.fp32_precision = allowed


def exactly(
    function: Callable[..., Sequence[Tensor]],
    *inputs: Tensor,
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """``function(*inputs)`` in `full_precision`, and its backward pass in it too.

    Args:
        function: of tensors, gives tensors; run once.
        inputs: what it is given, all on one device.
        parameters: what else it sends gradients to; anything not named gets none where TF32 is
            allowed.
    """
    device = inputs[0].device
    if PRODUCTS.fp32_precision != "tf32" or not torch.is_grad_enabled():
        with full_precision(device):
            return tuple(function(*inputs))
    found: tuple[Tensor, ...] = _Exactly.apply(function, len(inputs), *inputs, *parameters)
    return found


class _Exactly(torch.autograd.Function):
    """A graph of its own, from detached inputs to the outputs, gone through under one guard."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Sequence[Tensor]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = [
            tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors[:count]
        ]
        ctx.device, ctx.leaves = inputs[0].device, [*inputs, *tensors[count:]]
        with torch.enable_grad(), full_precision(ctx.device):
            ctx.outputs = tuple(function(*inputs))
        ctx.set_materialize_grads(False)
        found = tuple(output.detach() for output in ctx.outputs)
        pairs = zip(found, ctx.outputs, strict=True)
        ctx.mark_non_differentiable(*(own for own, inner in pairs if not inner.requires_grad))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        sent = [
            (output, gradient)
            for output, gradient in zip(ctx.outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        outputs, received = zip(*sent, strict=True)
        with full_precision(ctx.device):
            found = iter(torch.autograd.grad(outputs, wanted, received, allow_unused=True))
        return (None, None, *(next(found) if leaf.requires_grad else None for leaf in ctx.leaves))
