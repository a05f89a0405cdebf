"""Quantizers and similarities stay in float32 where TF32 or autocast is allowed around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reproduce.model import codebook, pretrainer, quantizer, rvq
from reproduce.model.encoder import EncoderConfig
from reproduce.model.precision import (
    CONVOLUTIONS,
    PRODUCTS,
    exactly,
    full_precision,
    set_precision,
)
from reproduce.model.pretrainer import PretrainingModel
from reproduce.model.rvq import ResidualQuantizers, RvqOptions
from reproduce.objective.ctc import ctc_loss

CPU = torch.device("cpu")
aten = torch.ops.aten
EXACT = ("ieee", False)
"""Neither TF32 nor autocast."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = [switch.fp32_precision for switch in (PRODUCTS, *CONVOLUTIONS)]
    yield
    for switch, precision in zip((PRODUCTS, *CONVOLUTIONS), before, strict=True):
        switch.fp32_precision = precision


def test_one_switch_for_products_and_convolutions() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as mixing torch's two interfaces would
        for precision, expected in (("tf32", "tf32"), ("bf16", "tf32"), ("float32", "ieee")):
            set_precision(precision)  # type: ignore[arg-type]
            assert {switch.fp32_precision for switch in (PRODUCTS, *CONVOLUTIONS)} == {expected}


def test_tf32_is_off_inside_and_as_before_outside() -> None:
    set_precision("tf32")
    with full_precision(CPU), full_precision(CPU):
        assert PRODUCTS.fp32_precision == "ieee"
    with pytest.raises(KeyError), full_precision(CPU):
        raise KeyError
    assert PRODUCTS.fp32_precision == "tf32"


def test_nothing_is_touched_where_tf32_is_off() -> None:
    before = PRODUCTS.fp32_precision
    with full_precision(CPU):
        assert PRODUCTS.fp32_precision == before != "tf32"


class Products(TorchDispatchMode):
    """(sizes of a product's operands, what float32 products were allowed) of each, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[set[int], str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            sizes = {size for arg in args for size in arg.shape}
            self.seen.append((sizes, PRODUCTS.fp32_precision))
        return func(*args, **(kwargs or {}))


def test_exactly_guards_the_backward_pass_and_changes_no_number() -> None:
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(6, 5), torch.randn(7, 6, requires_grad=True)

    def function(values: torch.Tensor) -> list[torch.Tensor]:
        out = layer(values)
        return [out.square().sum(), out.argmax(-1), out]

    found = []
    for precision in ("float32", "tf32"):
        set_precision(precision)  # type: ignore[arg-type]
        with Products() as products:
            loss, codes, out = exactly(function, inputs * 2, parameters=list(layer.parameters()))
            assert not codes.requires_grad
            (loss + (out @ torch.ones(5, 3)).sum() + layer.weight.sum()).backward()
        own = [allowed for sizes, allowed in products.seen if 6 in sizes]
        assert own == [{"float32": "ieee", "tf32": "ieee"}[precision]] * 3
        around = [allowed for sizes, allowed in products.seen if 6 not in sizes]
        assert around == [{"float32": "ieee", "tf32": "tf32"}[precision]] * 2
        parts = [loss, codes, out, inputs.grad, layer.weight.grad, layer.bias.grad]
        found.append([part.detach().clone() for part in parts if part is not None])
        inputs.grad = layer.weight.grad = layer.bias.grad = None
    assert len(found[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_exactly_sends_nothing_back_where_nothing_comes() -> None:
    set_precision("tf32")
    inputs, unused = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    _, summed = exactly(lambda x, _: [x * 2, x.sum()], inputs, unused)
    summed.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(inputs.grad, torch.ones(3))  # type: ignore[arg-type]
    assert unused.grad is None
    with torch.no_grad():
        (value,) = exactly(lambda x: [x * 2], inputs)
    assert not value.requires_grad


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[str, bool]]]:
    """The state in which each of the functions below was called: TF32 and autocast."""
    states: dict[str, set[tuple[str, bool]]] = {}

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def spy(*args: Any, **named: Any) -> Any:
            state = (PRODUCTS.fp32_precision, torch.is_autocast_enabled("cpu"))
            states.setdefault(name, set()).add(state)
            return function(*args, **named)

        monkeypatch.setattr(module, name, spy)

    for module, name in (
        (rvq, "nearest"),
        (rvq, "add_by_code"),
        (codebook, "add_by_code"),
        (rvq, "kmeans"),
        (quantizer.GumbelQuantizer, "_sample"),
        (pretrainer, "contrastive"),
        (pretrainer, "diversity"),
    ):
        watch(module, name)
    return states


def test_residual_quantizers(seen: dict[str, set[tuple[str, bool]]]) -> None:
    options = RvqOptions(codes=4, kmeans_init=True, padding=False)
    bank = ResidualQuantizers([2, 1], 8, seeds=[1, 2], options=options).train()
    set_precision("tf32")
    with torch.autocast("cpu", torch.bfloat16):
        bank.initialize(torch.randn(30, 8))
        bank(torch.randn(2, 9, 8))
    assert seen == {name: {EXACT} for name in ("nearest", "add_by_code", "kmeans")}
    assert PRODUCTS.fp32_precision == "tf32"


def test_backward_of_fine_tunings_float32_parts_has_no_product() -> None:
    """Gradients of residual quantizers and CTC are float32 and nothing that TF32 could change."""
    options = RvqOptions(codes=4, padding=False, straight_through=True)
    bank = ResidualQuantizers([2, 1], 8, seeds=[1, 2], options=options).train()
    features = torch.randn(2, 9, 8, requires_grad=True)
    logits = torch.randn(2, 9, 5, requires_grad=True)
    set_precision("tf32")
    with torch.autocast("cpu", torch.bfloat16):
        output = bank(features, torch.tensor([9, 7]))
        ctc = ctc_loss(
            logits.to(torch.bfloat16),
            torch.tensor([1, 2, 3]),
            torch.tensor([9, 7]),
            torch.tensor([2, 1]),
        )
    assert {part.dtype for part in (output.commitment, *output.quantized, ctc.loss)} == {
        torch.float32
    }
    loss = ctc.loss + output.commitment.sum() + sum(part.sum() for part in output.quantized)
    with Products() as products:
        loss.backward()
    assert not products.seen
    assert features.grad is not None
    assert bool(features.grad[0].abs().sum() > 0)
    assert logits.grad is not None
    assert bool(logits.grad[1].abs().sum() > 0)


def test_pretraining(seen: dict[str, set[tuple[str, bool]]]) -> None:
    """Products with 11 or 22 in their sizes are the quantizer's and the comparison's."""
    config = EncoderConfig(
        conv_channels=(8,) * 7, width=16, layers=1, heads=2, feed_forward=16, position_groups=2
    )
    found = []
    for precision in ("float32", "tf32"):
        set_precision(precision)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = PretrainingModel(config, entries=11, codevector_dim=8, projection_dim=11).train()
        mask = torch.zeros(1, 24, dtype=torch.bool)
        mask[:, 3:9] = True
        negatives = torch.full((1, 24, 2), 5)
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            out = model(torch.randn(1, 8000), mask=mask, negatives=negatives)
        with products:
            (out.contrastive_loss + out.diversity_loss).backward()
        own = [allowed for sizes, allowed in products.seen if sizes & {11, 22}]
        assert len(own) > 8
        assert set(own) == {"ieee"}
        around = {allowed for sizes, allowed in products.seen if not sizes & {11, 22, 6}}
        assert around == {"ieee" if precision == "float32" else "tf32"}
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)
    assert seen == {name: {EXACT} for name in ("_sample", "contrastive", "diversity")}
    assert PRODUCTS.fp32_precision == "tf32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_are_those_of_float32_on_a_gpu() -> None:
    """TF32 has ten bits of mantissa: without the guard many frames get another code."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 200, 64, generator=generator).cuda()
    options = RvqOptions(codes=128, padding=False, kmeans_init=True)
    found = []
    for precision in ("float32", "tf32"):
        set_precision(precision)  # type: ignore[arg-type]
        bank = ResidualQuantizers([4], 64, seeds=[1], options=options).cuda().train()
        bank.initialize(features)
        found.append(bank(features).codes[0])
    assert torch.equal(*found)
    bare = features[0] @ features[0].T  # the switch does something on this device
    set_precision("float32")
    assert torch.cuda.get_device_capability()[0] < 8 or not torch.equal(
        bare, features[0] @ features[0].T
    )
