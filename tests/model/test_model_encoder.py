from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from reproduce.compat import import_torchaudio
from reproduce.errors import DataError
from reproduce.model import operations
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.objective.frames import Frames

TINY = EncoderConfig(
    conv_channels=(32,) * 7,
    width=48,
    layers=2,
    heads=4,
    feed_forward=64,
    position_kernel=16,
    position_groups=4,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    layer_drop=0.0,
)
TINY_LAYER_NORM = dataclasses.replace(
    TINY, extractor="layer_norm", conv_bias=True, layer_norm_first=True
)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_LAYER_NORM], ids=["group", "layer"])


def make(config: EncoderConfig = TINY, **changes: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(dataclasses.replace(config, **changes))  # type: ignore[arg-type]


def torchaudio_model(config: EncoderConfig) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = import_torchaudio().models.wav2vec2_model(
        f"{config.extractor}",
        list(zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True)),
        config.conv_bias,
        config.width,
        config.projection_dropout,
        config.position_kernel,
        config.position_groups,
        config.layers,
        config.heads,
        config.attention_dropout,
        config.feed_forward,
        config.activation_dropout,
        config.dropout,
        config.layer_norm_first,
        config.layer_drop,
        None,
    )
    return model


@BOTH
def test_is_torchaudios_forward(config: EncoderConfig) -> None:
    """Also notices when the modules inside torchaudio change their names or meaning."""
    theirs = torchaudio_model(config).eval()
    ours = Encoder.from_torchaudio(theirs).eval()
    # a bare module of theirs says nothing of its input: as it is
    assert ours.config == dataclasses.replace(config, normalized=False)
    waveform = torch.randn(2, 5000)
    with torch.no_grad():
        torch.testing.assert_close(ours(waveform).features, theirs(waveform)[0])


def test_is_torchaudios_forward_with_padding() -> None:
    theirs = torchaudio_model(TINY_LAYER_NORM).eval()
    ours = Encoder.from_torchaudio(theirs).eval()
    waveform, lengths = torch.randn(3, 5000), torch.tensor([5000, 3200, 4100])
    with torch.no_grad():
        features, frames = ours(waveform, lengths)
        expected, expected_frames = theirs(waveform, lengths)
    assert torch.equal(frames, expected_frames)
    torch.testing.assert_close(features, expected)


def test_names_of_the_parameters() -> None:
    """transformer.* and the rest as Hugging Face's, so that weights need two renamings only."""
    names = set(make(TINY_LAYER_NORM).state_dict())
    layer = "transformer.layers.1."
    block = "feature_extractor.conv_layers.6."
    for name in (
        "mask_embedding",
        f"{block}conv.weight",
        f"{block}conv.bias",
        f"{block}layer_norm.weight",
        "feature_projection.layer_norm.weight",
        "feature_projection.projection.bias",
        "transformer.layer_norm.bias",
        "transformer.pos_conv_embed.conv.bias",
        "transformer.pos_conv_embed.conv.parametrizations.weight.original0",
        "transformer.pos_conv_embed.conv.parametrizations.weight.original1",
        *(f"{layer}attention.{p}_proj.weight" for p in ("q", "k", "v", "out")),
        f"{layer}layer_norm.weight",
        f"{layer}feed_forward.intermediate_dense.bias",
        f"{layer}feed_forward.output_dense.weight",
        f"{layer}final_layer_norm.bias",
    ):
        assert name in names


@BOTH
def test_padding(config: EncoderConfig) -> None:
    """Padding changes nothing with layer norm, and does change a group-norm encoder."""
    encoder = make(config).eval()
    waveform = torch.randn(1, 6000)
    padded = torch.cat([torch.nn.functional.pad(waveform, (0, 3000)), torch.randn(1, 9000)])
    with torch.no_grad():
        alone = encoder(waveform)
        together = encoder(padded, torch.tensor([6000, 9000]))
    frames = int(alone.lengths[0])
    assert together.lengths.tolist() == [frames, encoder.frames(9000)]
    difference = (together.features[0, :frames] - alone.features[0]).abs().max()
    assert (difference < 1e-5) == (config.extractor == "layer_norm")


def test_an_utterance_without_a_frame_does_no_harm() -> None:
    encoder = make(TINY_LAYER_NORM)
    out = encoder(torch.randn(2, 5000), torch.tensor([5000, 100]))
    out.features.sum().backward()
    assert out.lengths.tolist() == [encoder.frames(5000), 0]
    assert out.features.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("samples", [0, 399, 400, 401, 719, 720, 16000, 249999])
def test_frames(samples: int) -> None:
    encoder = make()
    count = encoder.frames(samples)
    assert encoder.frames(torch.tensor([samples])).tolist() == [count]
    if 400 <= samples < 20000:
        assert encoder(torch.randn(1, samples)).features.shape[1] == count
    if samples < 400:
        assert count == 0


def test_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make().eval()
    seen: list[Tensor] = []
    positions = encoder._positions
    monkeypatch.setattr(encoder, "_positions", lambda h: (seen.append(h), positions(h))[1])
    waveform = torch.randn(2, 5000)
    frames = encoder.frames(5000)
    mask = torch.rand(2, frames) < 0.5
    channels = torch.rand(2, 48) < 0.3
    plain = encoder(waveform)
    masked = encoder(waveform, mask=mask, channel_mask=channels)
    bare, hidden = seen
    for row in range(2):
        kept = ~channels[row]
        assert not hidden[row][:, channels[row]].any()
        embedding = encoder.mask_embedding[kept].expand(int(mask[row].sum()), -1)
        assert torch.equal(hidden[row][mask[row]][:, kept], embedding)
        assert torch.equal(hidden[row][~mask[row]][:, kept], bare[row][~mask[row]][:, kept])
    assert torch.equal(masked.extracted, plain.extracted)  # the quantizer's input is never masked


def test_a_mask_that_does_not_fit() -> None:
    encoder = make()
    frames = encoder.frames(5000)
    with pytest.raises(ValueError, match=rf"need bool \[2, {frames}\]"):
        encoder(torch.randn(2, 5000), mask=torch.zeros(2, frames + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"channel_mask is torch.int64 \[2, 48\]"):
        encoder(torch.randn(2, 5000), channel_mask=torch.zeros(2, 48, dtype=torch.int64))


def test_dropped_layers() -> None:
    encoder = make(layer_drop=1.0).train()
    encoder(torch.randn(1, 4000)).features.sum().backward()
    for name, parameter in encoder.transformer.named_parameters():
        assert (parameter.grad is None) == name.startswith("layers.")


def test_layer_drop_draws_alike_whatever_the_rate() -> None:
    following = []
    for rate in (0.0, 0.5):
        encoder = make(layer_drop=rate).train()
        torch.manual_seed(3)
        encoder(torch.randn(1, 4000))
        following.append(torch.rand(4))
    assert torch.equal(*following)
    encoder.eval()
    torch.manual_seed(3)
    encoder(torch.randn(1, 4000))
    torch.manual_seed(3)
    torch.randn(1, 4000)
    undisturbed = torch.rand(4)
    torch.manual_seed(3)
    encoder(torch.randn(1, 4000))
    assert torch.equal(torch.rand(4), undisturbed)


def test_extractor_gradient() -> None:
    waveform = torch.randn(1, 4000)
    gradients = []
    for factor in (1.0, 0.1):
        encoder = make(extractor_gradient=factor)
        encoder(waveform).features.square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, whole in gradients[0].items():
        if whole is not None:
            scale = 0.1 if name.startswith("feature_extractor") else 1.0
            torch.testing.assert_close(gradients[1][name], whole * scale)


def test_frozen_extractor() -> None:
    encoder = make()
    encoder.freeze_extractor()
    encoder(torch.randn(1, 4000)).features.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != name.startswith("feature_extractor")
    assert encoder.feature_projection.projection.weight.grad is not None  # type: ignore[union-attr]


def test_autocast() -> None:
    encoder = make(TINY_LAYER_NORM).eval()
    waveform = torch.randn(1, 5000)
    with torch.no_grad():
        exact = encoder(waveform).features
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(waveform).features.float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "config", [TINY, TINY_LAYER_NORM, EncoderConfig.base(), EncoderConfig.large()]
)
def test_huggingface_configuration_both_ways(config: EncoderConfig) -> None:
    assert EncoderConfig.from_huggingface(config.to_huggingface()) == config


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert EncoderConfig.from_huggingface(transformers.Wav2Vec2Config().to_dict()) == (
        EncoderConfig.base()
    )
    assert EncoderConfig.from_huggingface({}) == EncoderConfig.base()


def test_published_sizes() -> None:
    """Parameters of the published models, without their heads."""
    with torch.device("meta"):
        base, large = Encoder(EncoderConfig.base()), Encoder(EncoderConfig.large())
    assert sum(p.numel() for p in base.parameters()) == 94_371_712
    assert sum(p.numel() for p in large.parameters()) == 315_438_720


def test_foreign_architectures_are_listed() -> None:
    with pytest.raises(DataError) as caught:
        EncoderConfig.from_huggingface(
            {"model_type": "wavlm", "hidden_act": "relu", "feat_extract_norm": "batch"}
        )
    for part in ("wavlm", "relu", "batch"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="multiple of heads"):
        EncoderConfig.from_huggingface({"hidden_size": 50})


def test_wavlm_is_refused() -> None:
    model = import_torchaudio().models.wavlm_model(
        "group_norm", [(16, 10, 5)], False, 16, 0.0, 4, 2, 1, 2, 8, 16, 0.0, 16, 0.0, 0.0, False,
        0.0, None,
    )  # fmt: skip
    with pytest.raises(DataError, match="WavLM"):
        Encoder.from_torchaudio(model)


def test_torchaudio_built_for_another_cuda_still_loads() -> None:
    probe = (
        "import torch; torch.version.cuda = '99.9'; "
        "from reproduce.model.encoder import Encoder, EncoderConfig; "
        "Encoder(EncoderConfig(conv_channels=(8,) * 7, width=16, layers=1, heads=2))"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_group_norm_apart_gives_a_batch_what_each_utterance_gives_alone(
    dtype: torch.dtype, tolerance: float, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the convolutions of the CPU and by torch's, as a GPU has them; gradients too."""
    if not own:
        monkeypatch.setattr(operations, "has_own_convolutions", lambda _: False)
    torch.manual_seed(0)
    config = EncoderConfig(
        conv_channels=(16,) * 7, width=32, layers=2, heads=2, feed_forward=64, position_groups=2
    )
    encoder = Encoder(config).eval().to(dtype)
    waveform, lengths = torch.randn(5, 9000, dtype=dtype), [9000, 8990, 5000, 450, 100]
    for row, length in zip(waveform, lengths, strict=True):
        row[length:] = 0
    features, frames = encoder(waveform, torch.tensor(lengths), apart=True)
    assert frames.tolist() == [27, 27, 15, 1, 0]
    weight = encoder.feature_extractor.conv_layers[0].conv.weight
    direction = torch.randn(27, 32, dtype=dtype)
    (together,) = torch.autograd.grad((features * direction).sum(), weight)
    apart = torch.zeros_like(weight)
    for row, length, found, count in zip(waveform, lengths, features, frames, strict=True):
        assert found[count:].eq(0).all()
        if count:
            alone = encoder(row[None, :length]).features[0]
            torch.testing.assert_close(found[:count], alone, rtol=0, atol=tolerance)
            apart += torch.autograd.grad((alone * direction[:count]).sum(), weight)[0]
    scale = float(apart.abs().max())
    torch.testing.assert_close(together, apart, rtol=0, atol=20 * tolerance * scale)
    padded = encoder(waveform, torch.tensor(lengths)).features[2, :15]  # as published: not so
    assert (padded - features[2, :15]).abs().max() > 0.01


def test_wanted_frames_alone() -> None:
    """The same outputs and gradients as picking them from all; also where layers are dropped."""
    for config in (TINY, TINY_LAYER_NORM):
        for rate in (0.0, 0.5, 1.0):
            encoder = make(config, layer_drop=rate).train().double()
            waveform, lengths = torch.randn(3, 6000).double(), torch.tensor([6000, 3500, 4100])
            frames = encoder.frames(lengths)
            where = torch.rand(3, int(frames.max())) < 0.3
            where &= torch.arange(where.shape[1]) < frames[:, None]
            where[2] = False
            found = []
            for wanted in (Frames(where), None):
                torch.manual_seed(5)
                encoder.zero_grad()
                features = encoder(waveform, lengths, wanted=wanted).features
                features = features if wanted else features[where]
                weights = torch.arange(features.numel()).view_as(features).cos()
                (features * weights).sum().backward()
                found.append([features, *(p.grad for p in encoder.parameters())])
            for ours, obvious in zip(*found, strict=True):
                if obvious is None:
                    assert ours is None
                else:
                    torch.testing.assert_close(ours, obvious, rtol=1e-9, atol=1e-11)


@BOTH
@pytest.mark.parametrize("train", [True, False])
def test_own_convolutions_are_torchs(
    config: EncoderConfig, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerators, autocast and torch.compile take is what the CPU takes."""
    encoder = make(config).train(train).double()
    waveform, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 3600])
    found = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(operations, "has_own_convolutions", lambda _: False)
        encoder.zero_grad()
        features = encoder(waveform, lengths).features
        features.square().sum().backward()
        found.append([features, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_gradient_to_the_waveform() -> None:
    encoder = make().eval()
    waveform = torch.randn(1, 4000, requires_grad=True)
    encoder(waveform).features.sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.any()


def test_compiled() -> None:
    """The same numbers, one graph for all layers and lengths, weights under the same names."""
    encoder = make()
    names = set(encoder.state_dict())
    batches = [torch.randn(2, samples) for samples in (5000, 4000, 4500)]
    plain = [encoder(waveform).features for waveform in batches]
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    encoder.compile(backend=backend)
    for waveform, expected in zip(batches, plain, strict=True):
        torch.testing.assert_close(encoder(waveform).features, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2  # convolutions, and a layer
    assert set(encoder.state_dict()) == names


def test_compiled_in_all_its_variants(caplog: pytest.LogCaptureFixture) -> None:
    """With and without padding and gradient, one utterance and more, all frames and wanted ones:
    torch gives none of them up, which it would say in its log and run uncompiled."""
    encoder = make(TINY_LAYER_NORM)
    torch.compiler.reset()
    encoder.compile(backend="eager")
    for train, batch, samples, every in itertools.product(
        (True, False), (3, 1), ((5000, 5000), (5000, 3600)), (True, False)
    ):
        encoder.train(train)
        waveform = torch.randn(batch, 5000)
        lengths = torch.tensor(samples * 2)[-batch:]
        where = torch.rand(batch, encoder.frames(5000)) < 0.4
        with torch.set_grad_enabled(train):
            encoder(waveform, lengths, where, wanted=None if every else Frames(where))
    assert "recompile_limit" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_a_gpu_computes_what_the_cpu_does(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    encoder = make(config).train()
    waveform, lengths = torch.randn(2, 5000), torch.tensor([5000, 3600])
    where = torch.rand(2, encoder.frames(5000)) < 0.4
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        encoder.to(device).zero_grad()
        out = encoder(waveform.to(device), lengths, where, wanted=Frames(where, device))
        out.features.square().sum().backward()
        found.append([out.features.cpu(), *(p.grad.cpu() for p in encoder.parameters())])
    for cpu, gpu in zip(*found, strict=True):
        assert (gpu - cpu).norm() < 1e-3 * cpu.norm() + 1e-4
