"""The extractor under autocast: torchaudio's values and gradients, a fraction of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import DEVICES
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from reproduce.model.encoder import Encoder, EncoderConfig

CHANNELS = (32,) * 7


class Storages(TorchDispatchMode):
    """The storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def bytes(self) -> int:
        left = {ref.cdata: size for ref, size in self.made if not ref.expired()}
        return sum(left.values())


def measured(
    extract: Callable[[Tensor], Tensor], encoder: Encoder, device: str
) -> tuple[Any, list[Any], int]:
    """Outputs, gradients, and the bytes that wait for the backward pass."""
    encoder.zero_grad()
    waveform = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device, torch.bfloat16), Storages() as storages:
        out = extract(waveform)
    kept = storages.bytes()
    (out.float() * torch.linspace(-1, 1, out.shape[-1], device=device)).sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    return out.detach(), gradients, kept


@DEVICES
@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_the_extractor_keeps_its_convolutions_alone(extractor: Any, device: str) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(
        extractor=extractor, conv_channels=CHANNELS, width=32, heads=2, layers=1, feed_forward=32
    )
    encoder = Encoder(config).to(device)
    theirs: Any = encoder.feature_extractor
    projection: Any = encoder.feature_projection
    ours = measured(encoder._extract, encoder, device)
    reference = measured(
        lambda waveform: projection.layer_norm(theirs(waveform, None)[0]), encoder, device
    )
    assert torch.equal(ours[0], reference[0])
    assert len(ours[1]) == len(reference[1]) > 7
    for left, right in zip(ours[1], reference[1], strict=True):
        if device == "cpu":
            assert torch.equal(left, right)
        else:  # a GPU's sums needn't come in the same order twice
            assert (left - right).norm() <= 0.01 * right.norm()
    assert ours[2] < {"group_norm": 0.5, "layer_norm": 0.4}[extractor] * reference[2]


def test_nothing_is_kept_of_a_frozen_extractor() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(conv_channels=CHANNELS, width=32, heads=2, layers=1))
    encoder.freeze_extractor()
    waveform = torch.randn(2, 16000)
    with torch.autocast("cpu", torch.bfloat16), Storages() as storages:
        out = encoder._extract(waveform)
    frames = encoder.frames(16000)
    assert storages.bytes() < 16 * 2 * frames * 32 * 4 + 7 * 32 * 32 * 10 * 4
    out.sum().backward()
