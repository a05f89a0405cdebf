"""Decoding, conversion and packed access."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from reproduce.data.audio import (
    SAMPLE_RATE,
    AudioError,
    Decoded,
    PackedAudio,
    decode,
    normalize,
    pack,
    resample,
    to_float,
    to_int16,
)
from reproduce.errors import DataError


def noise(samples: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = samples if channels is None else (samples, channels)
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16000, form: str = "FLAC", sub: str = "PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=sub)
    return file.getvalue()


def sine(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("form", ["FLAC", "WAV"])
def test_16_bit_sources_come_back_bit_for_bit(form: str) -> None:
    source = np.random.default_rng(1).integers(-32768, 32768, 8000).astype(np.int16)
    samples, rate = decode(encoded(source, form=form))
    packed = pack(Decoded(samples, rate, ""))
    assert np.array_equal(packed.samples, source)
    assert packed.clipped == 0


@pytest.mark.parametrize(
    ("form", "sub"),
    [("FLAC", "PCM_S8"), ("FLAC", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "PCM_32"),
     ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16")],
)  # fmt: skip
def test_formats(form: str, sub: str) -> None:
    source = sine(440, 16000)
    samples, rate = decode(encoded(source, form=form, sub=sub))
    assert rate == 16000
    assert samples.dtype == (np.int16 if sub == "PCM_16" else np.float32)
    packed = to_float(pack(Decoded(samples, rate, "")).samples)
    assert len(packed) == len(source)
    assert np.abs(packed - source)[500:-500].max() < 0.1


@pytest.mark.parametrize("form", ["FLAC", "WAV", "AIFF", "OGG"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_truncated_files_are_noticed(form: str, kept: float) -> None:
    data = encoded(noise(16000), form=form, sub="VORBIS" if form == "OGG" else "PCM_16")
    decode(data)
    with pytest.raises(AudioError, match=r"truncated|can't be decoded"):
        decode(data[: int(len(data) * kept)])


def test_what_is_not_audio_is_refused() -> None:
    with pytest.raises(AudioError, match="empty file"):
        decode(b"")
    with pytest.raises(AudioError, match="can't be decoded"):
        decode(b"this is a letter, not a sound. " * 100)
    with pytest.raises(AudioError, match="sample rate 1000 Hz"):
        decode(encoded(noise(1000), rate=1000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    samples = noise(16000)
    samples[[8000, 9000]] = value
    with pytest.raises(AudioError, match=r"2 samples are NaN or infinite, the first at 0\.500 s"):
        pack(Decoded(samples, 16000, ""))


def test_silence_and_nothing_are_refused() -> None:
    with pytest.raises(AudioError, match="no samples"):
        pack(Decoded(np.zeros(0, np.float32), 16000, ""))
    for level in (0.0, 0.25):
        with pytest.raises(AudioError, match="silent"):
            pack(Decoded(np.full(1000, level, np.float32), 16000, ""))


def test_stereo_8_khz_is_mixed_down_and_resampled() -> None:
    left, right = sine(440, 8000), sine(1000, 8000)
    packed = pack(Decoded(np.stack([left, right], axis=1), 8000, "x"))
    expected = (sine(440, 16000) + sine(1000, 16000)) / 2
    assert (packed.rate, packed.channels, packed.sha256) == (8000, 2, "x")
    assert len(packed.samples) == len(expected)
    assert np.abs(to_float(packed.samples) - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000, 192000])
def test_resampling_keeps_a_tone_and_its_length(rate: int) -> None:
    resampled = resample(sine(1000, rate), rate)
    expected = sine(1000, SAMPLE_RATE)
    assert resampled.dtype == np.float32
    assert len(resampled) == math.ceil(round(rate * 0.5) * SAMPLE_RATE / rate)
    middle = slice(200, len(expected) - 200)
    assert np.abs(resampled[middle] - expected[middle]).max() < 2e-3


def test_resampling_does_not_alias() -> None:
    for hertz in (9000, 12000, 20000):
        assert np.abs(resample(sine(hertz, 48000), 48000)[200:-200]).max() < 2e-3


def test_int16_rounds_and_clips() -> None:
    samples = np.array([0, 0.5, -1, 1, 1.2, -3, 0.6 / 32768], dtype=np.float32)
    pcm, clipped = to_int16(samples)
    assert pcm.tolist() == [0, 16384, -32768, 32767, 32767, -32768, 1]
    assert clipped == 2
    assert pcm.dtype == np.dtype("<i2")


def test_normalize_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    for samples in (noise(16000) + 0.3, noise(400) * 1e-4):
        expected = extractor(samples, sampling_rate=16000)["input_values"][0]
        np.testing.assert_allclose(normalize(samples.astype(np.float32)), expected, rtol=1e-6)


def test_packed_audio_slices_without_copying(tmp_path: Path) -> None:
    pcm = np.arange(1000, dtype="<i2")
    path = tmp_path / "audio.pcm"
    path.write_bytes(pcm.tobytes())
    audio = PackedAudio(path)
    assert len(audio) == 1000
    assert np.array_equal(audio.slice(100, 50), pcm[100:150])
    assert len(audio.slice(1000, 0)) == 0
    copy = pickle.loads(pickle.dumps(audio))
    assert np.array_equal(copy.slice(990, 10), pcm[990:])
    with pytest.raises(DataError, match="the file has 1000"):
        audio.slice(990, 11)
    with pytest.raises(DataError, match="can't be read"):
        PackedAudio(tmp_path / "none.pcm").slice(0, 1)
