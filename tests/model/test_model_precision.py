"""Quantizers and similarities stay in float32 where TF32 or autocast is allowed around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from reproduce.model import codebook, pretrainer, quantizer, rvq
from reproduce.model.encoder import EncoderConfig
from reproduce.model.precision import full_precision
from reproduce.model.pretrainer import PretrainingModel
from reproduce.model.rvq import ResidualQuantizers, RvqOptions

CPU = torch.device("cpu")
PRODUCTS = torch.backends.cuda.matmul
EXACT = ("ieee", False)
"""Neither TF32 nor autocast."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    PRODUCTS.allow_tf32 = False


def by_the_older_switch() -> None:
    PRODUCTS.allow_tf32 = True


def by_the_newer_switch() -> None:
    PRODUCTS.fp32_precision = "tf32"


@pytest.mark.parametrize("allow", [by_the_older_switch, by_the_newer_switch])
def test_tf32_is_off_inside_and_as_before_outside(allow: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allow()
        with full_precision(CPU), full_precision(CPU):
            assert PRODUCTS.fp32_precision == "ieee"
        with pytest.raises(KeyError), full_precision(CPU):
            raise KeyError
        assert PRODUCTS.fp32_precision == "tf32"
        if allow is by_the_older_switch:
            assert PRODUCTS.allow_tf32  # torch refuses to answer where the two disagree


def test_nothing_is_touched_where_tf32_is_off() -> None:
    before = PRODUCTS.fp32_precision
    with full_precision(CPU):
        assert PRODUCTS.fp32_precision == before != "tf32"
    assert not PRODUCTS.allow_tf32


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
    by_the_older_switch()
    with torch.autocast("cpu", torch.bfloat16):
        bank.initialize(torch.randn(30, 8))
        bank(torch.randn(2, 9, 8))
    assert seen == {name: {EXACT} for name in ("nearest", "add_by_code", "kmeans")}
    assert PRODUCTS.fp32_precision == "tf32"


def test_pretraining(seen: dict[str, set[tuple[str, bool]]]) -> None:
    config = EncoderConfig(
        conv_channels=(8,) * 7, width=16, layers=1, heads=2, feed_forward=16, position_groups=2
    )
    model = PretrainingModel(config, entries=4, codevector_dim=8, projection_dim=8).train()
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[:, 3:9] = True
    negatives = torch.full((1, 24, 2), 5)
    by_the_older_switch()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 8000), mask=mask, negatives=negatives)
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
    for allowed in (False, True):
        PRODUCTS.allow_tf32 = allowed
        bank = ResidualQuantizers([4], 64, seeds=[1], options=options).cuda().train()
        bank.initialize(features)
        found.append(bank(features).codes[0])
    assert torch.equal(*found)
    bare = features[0] @ features[0].T  # the switch does something on this device
    PRODUCTS.allow_tf32 = False
    assert torch.cuda.get_device_capability()[0] < 8 or not torch.equal(
        bare, features[0] @ features[0].T
    )
