from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from reproduce.model.encoder import EncoderConfig
from reproduce.model.masking import drop_lonely, sample_negatives, span_mask
from reproduce.model.precision import set_precision
from reproduce.model.pretrainer import PretrainingModel, PretrainingOutput
from reproduce.objective.contrastive import compare

TINY = EncoderConfig(
    conv_channels=(32,) * 7,
    width=48,
    layers=2,
    heads=4,
    feed_forward=64,
    position_kernel=16,
    position_groups=4,
)
SAMPLES, NEGATIVES = 8000, 6


def make(codebooks: int = 4, **options: object) -> PretrainingModel:
    torch.manual_seed(0)
    encoder = dataclasses.replace(TINY, **options.pop("encoder", {}))  # type: ignore[call-overload]
    return PretrainingModel(
        encoder, codebooks=codebooks, entries=12, codevector_dim=32, projection_dim=24, **options
    )  # type: ignore[arg-type]


def inputs(model: PretrainingModel, batch: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    frames = model.encoder.frames(SAMPLES)
    mask, _ = drop_lonely(span_mask([frames] * batch, frames, probability=0.5, length=3, rng=rng))
    return {
        "waveform": torch.from_numpy(rng.standard_normal((batch, SAMPLES)).astype(np.float32)),
        "mask": torch.from_numpy(mask),
        "negatives": torch.from_numpy(sample_negatives(mask, NEGATIVES, rng)),
    }


def losses(out: PretrainingOutput) -> list[torch.Tensor]:
    return [out.contrastive_loss, out.chance_loss, out.diversity_loss, out.perplexity]


def test_negatives_in_either_shape() -> None:
    model = make().eval()
    given = inputs(model)
    whole = torch.zeros(*given["mask"].shape, NEGATIVES, dtype=torch.int64)
    whole[given["mask"]] = given["negatives"]
    a, b = model(**given), model(**given | {"negatives": whole})
    for left, right in zip(losses(a), losses(b), strict=True):
        assert torch.equal(left, right)
    assert a.masked_frames == len(a.codes) == len(a.codevectors) == int(given["mask"].sum())


def test_a_batch_is_the_sum_of_its_utterances() -> None:
    """Sum, count, divide once: batches may be cut anywhere."""
    model = make(encoder={"extractor": "layer_norm"}).eval()
    given = inputs(model)
    whole = model(**given)
    rows = given["mask"].nonzero()[:, 0]
    parts = [
        model(
            given["waveform"][n : n + 1],
            mask=given["mask"][n : n + 1],
            negatives=given["negatives"][rows == n],
        )
        for n in range(3)
    ]
    for name in ("contrastive_loss", "chance_loss", "masked_frames", "negatives_kept"):
        total, *others = (
            float(torch.as_tensor(getattr(o, name)).detach()) for o in (whole, *parts)
        )
        assert total == pytest.approx(sum(others), rel=1e-5)


def test_removing_collisions() -> None:
    given = inputs(make())
    everything = make(1, remove_collisions=False).eval()(**given)
    kept = make(1).eval()(**given)
    frames = everything.masked_frames
    assert everything.negatives_kept == frames * NEGATIVES
    assert everything.chance_loss.item() == pytest.approx(frames * math.log(1 + NEGATIVES))
    assert 0 < kept.negatives_kept < everything.negatives_kept
    assert kept.contrastive_loss < everything.contrastive_loss


def test_both_diversity_forms_are_summed_over_frames() -> None:
    given = inputs(make())
    out = make(diversity="perplexity").eval()(**given)
    expected = (4 * 12 - out.perplexity) / (4 * 12) * out.masked_frames
    torch.testing.assert_close(out.diversity_loss, expected)
    entropy = make(diversity="entropy").eval()(**given)
    assert 0 < entropy.diversity_loss < entropy.masked_frames
    assert entropy.diversity_loss != out.diversity_loss


def test_arms_of_a_seed_share_weights_and_dropout() -> None:
    """All but the quantizer starts alike for any G, and the noise takes no draw from dropout."""
    models = [make(codebooks).train() for codebooks in (2, 8)]
    left, right = (dict(model.named_parameters()) for model in models)
    for name, value in left.items():
        if not name.startswith("quantizer."):
            assert torch.equal(value, right[name]), name
    following = []
    for model in models:
        torch.manual_seed(9)
        model(**inputs(model), generator=torch.Generator().manual_seed(2))
        following.append(torch.rand(3))
    assert torch.equal(*following)


def test_no_masked_frame() -> None:
    for train in (True, False):
        model = make().train(train)
        given = inputs(model)
        given["mask"] = torch.zeros_like(given["mask"])
        given["negatives"] = torch.zeros(0, NEGATIVES, dtype=torch.int64)
        out = model(**given)
        (out.contrastive_loss + out.diversity_loss).backward()
        assert out.masked_frames == 0
        assert out.contrastive_loss.item() == out.diversity_loss.item() == 0.0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_lonely_frame_that_was_not_dropped_has_no_nan() -> None:
    model = make().eval()
    given = inputs(model)
    given["mask"] = torch.zeros_like(given["mask"])
    given["mask"][0, 4] = True
    given["negatives"] = torch.full((1, NEGATIVES), 4)
    out = model(**given)
    assert out.contrastive_loss.item() == out.chance_loss.item() == 0.0
    assert int(out.negatives_kept) == 0


def test_losses_stay_in_float32_under_autocast() -> None:
    model = make(encoder={"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0})
    given = inputs(model)
    exact = model.eval()(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**given)
        out.contrastive_loss.backward()
    assert all(value.dtype == torch.float32 for value in losses(out))
    assert out.contrastive_loss.item() == pytest.approx(exact.contrastive_loss.item(), rel=0.02)


def test_gradients_reach_everything_and_codebooks() -> None:
    model = make(encoder={"layer_drop": 0.0}).train()
    out = model(**inputs(model), gumbel_temperature=1.0)
    (out.contrastive_loss + out.diversity_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    (codevectors,) = model.codebook_parameters()
    (gradient,) = torch.autograd.grad(model.quantizer.codebooks().sum(), codevectors)
    assert gradient.shape == codevectors.shape


def test_it_learns() -> None:
    """A few steps on one batch bring the loss below chance."""
    model = make(2, encoder={"layer_drop": 0.0}).train()
    given = inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        out = model(**given, gumbel_temperature=1.0, generator=generator)
        optimizer.zero_grad()
        (out.contrastive_loss / out.masked_frames).backward()
        optimizer.step()
    assert (out.contrastive_loss / out.chance_loss).item() < 0.85


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "needs mask and negatives"),
        ({"negatives": torch.zeros(2, 5, dtype=torch.int64)}, "don't fit a mask"),
        ({"mask": torch.zeros(3, 7, dtype=torch.bool)}, "mask is torch.bool"),
    ],
)
def test_inconsistent_arguments(change: dict[str, torch.Tensor | None], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        model(**inputs(model) | change)


def test_negatives_outside_the_utterance() -> None:
    model = make()
    given = inputs(model)
    given["negatives"][0, 0] = given["mask"].shape[1]
    with pytest.raises(ValueError, match="outside 0"):
        model(**given)


def train_short(precision: torch.dtype | None, device: str, updates: int = 24) -> list[float]:
    """Loss over chance of each update; everything random alike in all precisions."""
    off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    torch.manual_seed(0)  # what CUDA drops depends on the type, on the CPU it doesn't
    model = make(2, encoder={"layer_drop": 0.0} | (off if device == "cuda" else {}))
    model = model.to(device).train()
    given = inputs(model)
    waveform = given.pop("waveform").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    noise = torch.Generator(device).manual_seed(0)
    curve = []
    for _ in range(updates):
        with torch.autocast(device, precision, enabled=precision is not None):
            out = model(waveform, **given, gumbel_temperature=1.0, generator=noise)
        optimizer.zero_grad()
        (out.contrastive_loss / out.masked_frames).backward()
        optimizer.step()
        curve.append((out.contrastive_loss / out.chance_loss).item())
    return curve


def assert_converge_alike(exact: list[float], rounded: list[float]) -> None:
    assert rounded[0] == pytest.approx(exact[0], abs=0.02)
    ends = [sum(curve[-8:]) / 8 for curve in (exact, rounded)]
    assert all(end < 0.97 for end in ends)
    assert ends[1] == pytest.approx(ends[0], abs=0.06)


def test_training_converges_alike_in_bf16() -> None:
    assert_converge_alike(train_short(None, "cpu"), train_short(torch.bfloat16, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_converges_alike_on_a_gpu() -> None:
    exact = train_short(None, "cuda", 60)
    assert_converge_alike(exact, train_short(torch.bfloat16, "cuda", 60))
    set_precision("tf32")
    try:
        assert_converge_alike(exact, train_short(None, "cuda", 60))
    finally:
        set_precision("float32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("train", [True, False])
def test_a_gpu_computes_what_the_cpu_does(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    off = {"layer_drop": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = make(encoder=off).train(train)
    given = inputs(model)
    noise = torch.zeros(int(given["mask"].sum()), 4, 12)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        own = given | {"waveform": given["waveform"].to(device)}
        out = model(**own, gumbel_noise=noise.to(device))
        out.contrastive_loss.backward()
        found.append([value.cpu() for value in losses(out)])
        if device == "cuda":  # the mask may lie there too
            moved = {name: value.to(device) for name, value in given.items()}
            again = model(**moved, gumbel_noise=noise.to(device))
            torch.testing.assert_close(again.contrastive_loss, out.contrastive_loss)
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)


def test_a_subset_is_compared_among_itself() -> None:
    """Of one utterance's frames: what a batch without the others gives; the rest is unchanged."""
    model = make(encoder={"extractor": "layer_norm"}).eval()
    given = inputs(model)
    rows = given["mask"].nonzero()[:, 0]
    only = given["mask"].clone()
    only[[0, 2]] = False
    cpu = torch.device("cpu")
    with torch.no_grad():
        whole = model(**given)
        both = model(**given, subset=compare(only, given["negatives"][rows == 1], cpu))
        alone = model(
            given["waveform"][1:2], mask=only[1:2], negatives=given["negatives"][rows == 1]
        )
    assert whole.subset is None
    assert torch.equal(both.contrastive_loss, whole.contrastive_loss)
    assert both.subset is not None
    assert both.subset.count == alone.masked_frames
    assert float(both.subset.loss) == pytest.approx(float(alone.contrastive_loss), rel=1e-5)
    assert float(both.subset.chance) == pytest.approx(float(alone.chance_loss), rel=1e-6)


def test_a_subset_has_masked_frames_only() -> None:
    model = make().eval()
    given = inputs(model)
    outside = ~given["mask"]
    drawn = torch.from_numpy(sample_negatives(outside.numpy(), NEGATIVES, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="aren't masked"):
        model(**given, subset=compare(outside, drawn, torch.device("cpu")))
