"""Our pretraining model against transformers' on the same weights, mask, negatives and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reproduce.model.interop import load_encoder, load_pretraining_model
from reproduce.model.masking import sample_negatives, span_mask

transformers = pytest.importorskip("transformers")

ENTRIES, NEGATIVES, DIVERSITY_WEIGHT = 12, 9, 0.1
SAMPLES = [9000, 6000, 7300]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def make_reference(extractor: str, codebooks: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.Wav2Vec2Config(
        feat_extract_norm=extractor,
        conv_bias=extractor == "layer",
        do_stable_layer_norm=extractor == "layer",
        conv_dim=(32,) * 7,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_codevectors_per_group=ENTRIES,
        num_codevector_groups=codebooks,
        codevector_dim=32,
        proj_codevector_dim=24,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        layerdrop=0.0,
    )
    model = transformers.Wav2Vec2ForPreTraining(config)
    with torch.no_grad():  # lively norms and biases: initial ones and zeros hide mistakes
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "codevectors" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Batch:
    """A ragged batch with its mask, negatives and Gumbel noise."""

    def __init__(self, model: Any, codebooks: int, dtype: torch.dtype) -> None:
        rng = np.random.default_rng(1)
        self.samples = torch.tensor(SAMPLES)
        frames = model._get_feat_extract_output_lengths(self.samples)
        total = int(frames.max())
        self.waveform = torch.zeros(len(SAMPLES), max(SAMPLES), dtype=dtype)
        for row, count in zip(self.waveform, SAMPLES, strict=True):
            row[:count] = torch.from_numpy(rng.standard_normal(count))
        mask = span_mask(frames.tolist(), total, probability=0.6, length=4, rng=rng)
        self.mask = torch.from_numpy(mask)
        self.negatives = torch.zeros(*mask.shape, NEGATIVES, dtype=torch.int64)
        self.negatives[self.mask] = torch.from_numpy(sample_negatives(mask, NEGATIVES, rng))
        self.noise = torch.from_numpy(rng.gumbel(size=(*mask.shape, codebooks, ENTRIES))).to(dtype)

    @property
    def flat_negatives(self) -> torch.Tensor:
        """Positions in the flattened batch, as transformers wants them."""
        batch, total = self.mask.shape
        return self.negatives + torch.arange(batch)[:, None, None] * total

    @property
    def attention_mask(self) -> torch.Tensor:
        return torch.arange(self.waveform.shape[1]) < self.samples[:, None]


def our_name(name: str) -> str:
    name = name.replace("wav2vec2.masked_spec_embed", "encoder.mask_embedding")
    return name.replace("wav2vec2.encoder.", "encoder.transformer.").replace(
        "wav2vec2.", "encoder."
    )


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((ours - reference).norm() / reference.norm().clamp_min(1e-30)).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("codebooks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("extractor", ["group", "layer"])
def test_losses_and_gradients_agree(
    extractor: str,
    codebooks: int,
    train: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = make_reference(extractor, codebooks)
    reference.save_pretrained(tmp_path)
    ours = load_pretraining_model(tmp_path).to(dtype).train(train)
    reference.to(dtype).train(train)
    batch = Batch(reference, codebooks, dtype)
    temperature = 1.7
    reference.set_gumbel_temperature(temperature)

    def gumbel_softmax(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        assert hard
        soft = ((logits + batch.noise.view_as(logits)) / tau).softmax(-1)
        picked = torch.nn.functional.one_hot(soft.argmax(-1), ENTRIES).to(soft.dtype)
        return picked - soft.detach() + soft

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
        if dtype == torch.float64:  # the reference goes through float32 on its way
            patch.setattr(torch.Tensor, "float", lambda self: self)
        expected = reference(
            batch.waveform.clone(),
            attention_mask=batch.attention_mask if extractor == "layer" else None,
            mask_time_indices=batch.mask,
            sampled_negative_indices=batch.flat_negatives,
        )
    expected.loss.backward()
    out = ours(
        batch.waveform,
        batch.samples,
        batch.mask,
        batch.negatives,
        gumbel_noise=batch.noise[batch.mask] if train else None,
        gumbel_temperature=temperature,
    )
    (out.contrastive_loss + DIVERSITY_WEIGHT * out.diversity_loss).backward()

    tolerance = TOLERANCE[dtype]
    for ours_value, reference_value in (
        (out.contrastive_loss, expected.contrastive_loss),
        (out.diversity_loss, expected.diversity_loss),
        (out.perplexity, expected.codevector_perplexity),
    ):
        assert relative(ours_value, reference_value) < tolerance
    assert out.masked_frames == int(batch.mask.sum())
    if codebooks == 1:
        assert out.negatives_kept < out.masked_frames * NEGATIVES  # collisions did occur

    theirs = {our_name(name): parameter for name, parameter in reference.named_parameters()}
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == theirs.keys()
    for name, parameter in parameters.items():
        if name.endswith("k_proj.bias"):  # its true gradient is zero
            continue
        gradient, wanted = parameter.grad, theirs[name].grad
        if wanted is None or not wanted.any():
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        assert relative(gradient, wanted) < tolerance, name


@pytest.mark.parametrize("extractor", ["group", "layer"])
def test_features_agree(extractor: str, tmp_path: Path) -> None:
    reference = make_reference(extractor, codebooks=2).eval()
    reference.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    batch = Batch(reference, 2, torch.float32)
    with torch.no_grad():
        features, lengths = encoder(batch.waveform, batch.samples)
        expected = reference.wav2vec2(
            batch.waveform, attention_mask=batch.attention_mask if extractor == "layer" else None
        ).last_hidden_state
        unpadded, _ = encoder(batch.waveform[1:2, : SAMPLES[1]])
        alone = reference.wav2vec2(batch.waveform[1:2, : SAMPLES[1]]).last_hidden_state
    assert lengths.tolist() == reference._get_feat_extract_output_lengths(batch.samples).tolist()
    assert relative(features, expected) < 1e-4
    assert relative(unpadded, alone) < 1e-4


@pytest.mark.parametrize("extractor", ["group", "layer"])
def test_negatives_may_be_any_frames(extractor: str, tmp_path: Path) -> None:
    """Unmasked frames, and even the frame itself, can be drawn, as in transformers."""
    reference = make_reference(extractor, codebooks=2).eval()
    reference.save_pretrained(tmp_path)
    ours = load_pretraining_model(tmp_path)
    batch = Batch(reference, 2, torch.float32)
    shape = batch.negatives.shape
    batch.negatives = torch.randint(shape[1], shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = ours(batch.waveform, mask=batch.mask, negatives=batch.negatives)
        expected = reference(
            batch.waveform,
            mask_time_indices=batch.mask,
            sampled_negative_indices=batch.flat_negatives,
        )
    assert relative(out.contrastive_loss, expected.contrastive_loss) < 1e-4
    assert relative(out.perplexity, expected.codevector_perplexity) < 1e-4
    assert len(out.codes) == out.masked_frames
