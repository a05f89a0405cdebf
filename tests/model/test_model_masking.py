from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from reproduce.compat import import_torchaudio
from reproduce.model.masking import (
    channel_mask,
    drop_lonely,
    sample_negatives,
    span_mask,
    speech_frames,
)
from reproduce.position import generator


def reference() -> Any:
    """transformers' module, which imports torchaudio: through ours first, any build will do."""
    pytest.importorskip("transformers")
    import_torchaudio()
    return importlib.import_module("transformers.models.wav2vec2.modeling_wav2vec2")


def spans(row: np.ndarray) -> int:
    """Spans of touching or overlapping masks in a row."""
    return int(np.diff(np.concatenate([[0], row.astype(int)])).clip(min=0).sum())


@pytest.mark.parametrize("drawn", ["utterance", "batch"])
@pytest.mark.parametrize(("probability", "length"), [(0.65, 10), (0.05, 10), (0.3, 3)])
def test_fraction_is_that_of_transformers(probability: float, length: int, drawn: str) -> None:
    modeling = reference()
    torch = pytest.importorskip("torch")
    frames, total, repeats = [499, 310, 120, 40], 499, 300
    attention = torch.arange(total) < torch.tensor(frames)[:, None]
    np.random.seed(0)  # noqa: NPY002, the reference's only stream
    ours, theirs = np.zeros(4), np.zeros(4)
    for update in range(repeats):
        ours += span_mask(
            frames,
            total,
            probability=probability,
            length=length,
            spans_drawn=drawn,  # type: ignore[arg-type]
            rng=generator(0, "mask", update),
        ).sum(axis=1)
        theirs += modeling._compute_mask_indices(
            (4, total), probability, length, attention_mask=attention, min_masks=2
        ).sum(axis=1)
    np.testing.assert_allclose(ours / repeats, theirs / repeats, rtol=0.06)


def test_wav2vec2_masks_half_of_the_frames() -> None:
    """wav2vec 2.0: probability 0.65, length 10 masks about 49 % of the frames."""
    mask = span_mask([779] * 200, 779, probability=0.65, length=10, rng=np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.49, abs=0.02)


def test_number_of_spans_is_drawn_once_a_batch_or_once_an_utterance() -> None:
    """With length 1 the masked frames are the spans: floor(0.05 * 90 + U) is 4 or 5."""
    for drawn, distinct in (("batch", 1), ("utterance", 2)):
        seen = set()
        for seed in range(20):
            rng = np.random.default_rng(seed)
            mask = span_mask(
                [90] * 30,
                90,
                probability=0.05,
                length=1,
                spans_drawn=drawn,  # type: ignore[arg-type]
                rng=rng,
            )
            counts = set(mask.sum(axis=1).tolist())
            assert len(counts) == distinct
            seen |= counts
        assert seen == {4, 5}


def test_padding_and_short_utterances_stay_unmasked() -> None:
    frames = [50, 20, 9, 0]
    for seed in range(20):
        mask = span_mask(frames, 50, probability=0.65, length=10, rng=np.random.default_rng(seed))
        for row, valid in zip(mask, frames, strict=True):
            assert not row[valid:].any()
        assert mask[:2].any(axis=1).all()
        assert not mask[2:].any()
    assert not span_mask([5], 5, probability=1.0, length=10, rng=np.random.default_rng(0)).any()


def test_at_least_min_spans() -> None:
    mask = span_mask(
        [200], 200, probability=0.0, length=10, min_spans=2, rng=np.random.default_rng(1)
    )
    assert 10 < mask.sum() <= 20
    assert 1 <= spans(mask[0]) <= 2
    none = span_mask(
        [200], 200, probability=0.0, length=10, min_spans=0, rng=np.random.default_rng(1)
    )
    assert not none.any()


def test_same_position_same_mask() -> None:
    masks = [
        span_mask([90, 70], 90, probability=0.4, length=5, rng=generator(7, "mask", 3, 1))
        for _ in range(2)
    ]
    assert np.array_equal(*masks)


def test_bad_arguments() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="length 0"):
        span_mask([9], 9, probability=0.5, length=0, rng=rng)
    with pytest.raises(ValueError, match="12 frames in a batch of 9"):
        span_mask([12], 9, probability=0.5, length=2, rng=rng)


def test_channel_mask() -> None:
    mask = channel_mask(40, 768, probability=0.5, length=64, rng=np.random.default_rng(0))
    assert mask.shape == (40, 768)
    assert 0.25 < mask.mean() < 0.5
    assert not channel_mask(2, 48, probability=0.0, length=8, rng=np.random.default_rng(0)).any()


def test_drop_lonely() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    kept, skipped = drop_lonely(mask)
    assert skipped == 2
    assert kept.sum(axis=1).tolist() == [2, 0, 0, 3]
    assert mask[1, 1]  # the argument is left alone


def test_negatives_are_the_other_masked_frames_of_the_utterance() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((5, 30)) < 0.4
    mask[3] = False
    negatives = sample_negatives(mask, 400, rng)
    rows, frames = mask.nonzero()
    assert negatives.shape == (mask.sum(), 400)
    assert negatives.dtype == np.int64
    for row, frame, drawn in zip(rows, frames, negatives, strict=True):
        assert set(drawn.tolist()) == set(np.flatnonzero(mask[row]).tolist()) - {frame}


def test_negatives_are_uniform_as_in_transformers() -> None:
    modeling = reference()
    mask = np.zeros((1, 12), dtype=bool)
    mask[0, [1, 4, 5, 8, 11]] = True
    draws = 20000
    ours = sample_negatives(mask, draws, np.random.default_rng(0))
    np.random.seed(0)  # noqa: NPY002, the reference's only stream
    theirs = modeling._sample_negative_indices((1, 12), draws, mask)[mask]
    for left, right in zip(ours, theirs, strict=True):
        left, right = (np.bincount(v, minlength=12) / draws for v in (left, right))
        np.testing.assert_allclose(left, right, atol=0.02)
        np.testing.assert_allclose(left[left > 0], 0.25, atol=0.02)


def test_a_lonely_frame_is_an_error() -> None:
    mask = np.zeros((2, 5), dtype=bool)
    mask[0, :2] = mask[1, 0] = True
    with pytest.raises(ValueError, match=r"utterances \[1\]"):
        sample_negatives(mask, 3, np.random.default_rng(0))
    assert sample_negatives(np.zeros((2, 5), dtype=bool), 3, np.random.default_rng(0)).size == 0


def test_speech_frames_are_those_within_40_db_of_the_loudest() -> None:
    rng = np.random.default_rng(0)
    levels = [0.0, -20.0, -39.0, -41.0, -60.0, 0.0]  # dB, a second each
    samples = np.concatenate([rng.normal(0, 10 ** (db / 20), 16000) for db in levels])
    frames = (len(samples) - 400) // 320 + 1
    found = speech_frames(
        [samples.astype(np.float32), np.ones(720, np.float32)],
        [frames, 2],
        frames,
        hop=320,
        window=400,
        floor=40.0,
    )
    seconds = [found[0, 50 * s + 2 : 50 * s + 47].mean() for s in range(6)]
    assert seconds == pytest.approx([1, 1, 1, 0, 0, 1], abs=0.1)
    assert found[1].tolist() == [True, True] + [False] * (frames - 2)


def test_speech_frames_as_slow_as_obvious() -> None:
    rng = np.random.default_rng(1)
    samples = (rng.normal(size=5000) * np.exp(rng.normal(0, 3, 5000))).astype(np.float32)
    frames = (5000 - 400) // 320 + 1
    energy = [
        np.square(samples[f * 320 : f * 320 + 400].astype(float)).sum() for f in range(frames)
    ]
    loud = [value > max(energy) / 1e4 for value in energy]
    assert speech_frames([samples], [frames], frames, hop=320, window=400)[0].tolist() == loud
