"""Span masks and negatives, from a given random generator: numpy only.

B utterances, F frames (padding included), N masked frames, K negatives, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]


def span_mask(
    frames: Sequence[int],
    total: int,
    *,
    probability: float,
    length: int,
    min_spans: int = 2,
    spans_drawn: Literal["utterance", "batch"] = "utterance",
    rng: np.random.Generator,
) -> BoolArray:
    """Masked frames [B, total], in spans of ``length`` that may overlap (wav2vec 2.0, sect. 3.1).

    An utterance of n frames gets ``probability * n / length + U(0, 1)`` spans, rounded down, with
    starts drawn without replacement: the arithmetic of transformers' ``_compute_mask_indices``.
    Padding is never masked; an utterance shorter than a span gets no mask. (transformers marks the
    last frame of the padding in that case, which has no negatives and so no loss.)

    Args:
        frames: valid frames of each utterance.
        total: frames of the padded batch, F.
        probability: share of frames that begin a span, times ``length``; an upper bound of the
            share that is masked.
        length: frames a span.
        min_spans: least spans an utterance.
        spans_drawn: draw U once for each utterance (fairseq) or once for the batch (transformers).
        rng: drawn from in the order of the utterances.

    Raises:
        ValueError: a length below 1, or an utterance longer than ``total``.
    """
    if length < 1:
        raise ValueError(f"span length {length}: at least 1 is needed")
    if max(frames, default=0) > total:
        raise ValueError(f"an utterance of {max(frames)} frames in a batch of {total}")
    mask = np.zeros((len(frames), total), dtype=np.bool_)
    offsets = np.arange(length)
    common = rng.random() if spans_drawn == "batch" else 0.0
    for row, valid in zip(mask, frames, strict=True):
        rounding = common if spans_drawn == "batch" else rng.random()
        spans = max(int(probability * valid / length + rounding), min_spans)
        starts = max(valid - length + 1, 0)
        spans = min(spans, total // length, starts)
        if spans > 0:
            chosen = rng.choice(starts, spans, replace=False)
            row[(chosen[:, None] + offsets).ravel()] = True
    return mask


def channel_mask(
    batch: int,
    channels: int,
    *,
    probability: float,
    length: int,
    min_spans: int = 0,
    rng: np.random.Generator,
) -> BoolArray:
    """Zeroed channels [B, D] for fine-tuning, in spans of ``length``; as :func:`span_mask`."""
    return span_mask(
        [channels] * batch,
        channels,
        probability=probability,
        length=length,
        min_spans=min_spans,
        spans_drawn="batch",
        rng=rng,
    )


def speech_frames(
    waveform: Sequence[NDArray[np.float32]],
    frames: Sequence[int],
    total: int,
    *,
    hop: int,
    window: int,
    floor: float = 40.0,
) -> BoolArray:
    """Frames [B, total] that are no silence: within ``floor`` dB of the utterance's loudest one.

    A frame's energy is the mean square of the samples that the encoder's frame sees.

    Args:
        waveform: samples of each utterance, zero mean.
        frames: valid frames of each utterance; none of them reaches behind its samples.
        total: frames of the padded batch, F.
        hop: samples from frame to frame.
        window: samples a frame sees.
        floor: dB.
    """
    found = np.zeros((len(frames), total), dtype=np.bool_)
    for row, samples, valid in zip(found, waveform, frames, strict=True):
        sums = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
        first = np.arange(valid) * hop
        energy = sums[first + window] - sums[first]
        row[:valid] = energy > energy.max(initial=0.0) * 10.0 ** (-floor / 10.0)
    return found


def drop_lonely(mask: BoolArray) -> tuple[BoolArray, int]:
    """Clear utterances with a single masked frame: it has no negative.

    Returns:
        The mask [B, F] (a copy), and how many utterances are left without a masked frame, whether
        they had one or none: they take no part in the loss.
    """
    alone = mask.sum(axis=1) < 2
    return mask & ~alone[:, None], int(alone.sum())


def sample_negatives(mask: BoolArray, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Negatives of each masked frame, uniform over its utterance's other masked frames.

    Args:
        mask: masked frames [B, F].
        count: K, drawn with replacement.
        rng: the random generator.

    Returns:
        Positions [N, K] in 0..F-1 of the same utterance, for the masked frames in row-major order.

    Raises:
        ValueError: an utterance with a single masked frame; :func:`drop_lonely` clears such.
    """
    per_utterance = mask.sum(axis=1)
    if (per_utterance == 1).any():
        which = np.flatnonzero(per_utterance == 1).tolist()
        raise ValueError(f"utterances {which} have a single masked frame: no negatives to draw")
    positions = mask.nonzero()[1]
    first = np.repeat(np.cumsum(per_utterance) - per_utterance, per_utterance)[:, None]  # [N, 1]
    others = np.repeat(per_utterance - 1, per_utterance)[:, None]
    own = np.arange(len(positions))[:, None] - first
    drawn = (rng.random((len(positions), count)) * others).astype(np.int64)  # 0..others-1
    drawn += drawn >= own
    negatives: NDArray[np.int64] = positions[first + drawn].astype(np.int64, copy=False)
    return negatives
