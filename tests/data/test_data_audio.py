"""Decoding, conversion and packed access."""

from __future__ import annotations

import io
import math
import os
import pickle
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
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
    duration,
    normalize,
    pack,
    resample,
    shard_name,
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


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile writes a second file beside a nameless one of SD2, in the working folder."""
    monkeypatch.chdir(tmp_path)


def written(form: str) -> dict[str, bytes]:
    """A second of noise in a container, by each encoding that libsndfile writes there."""
    files = {}
    for sub in soundfile.available_subtypes(form):
        with suppress(soundfile.SoundFileError):
            files[sub] = encoded(noise(16000), form=form, sub=sub)
    return files


TAKEN = {
    "FLAC", "HTK", "WAV", "WAVEX", "AIFF", "SVX", "RF64", "W64", "AU", "NIST", "CAF", "OGG", "MP3",
}  # fmt: skip
UNSEEKABLE = {"DWVW_16", "DWVW_24"}
"""Encodings that libsndfile writes and can't read from memory."""


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("form", sorted(soundfile.available_formats()))
def test_every_container_is_decoded_whole_or_refused(form: str) -> None:
    """Whatever libsndfile writes: all of it, or a reason; never a part of it, never another
    error."""
    for sub, data in written(form).items():
        if form in TAKEN and sub not in UNSEEKABLE:
            samples, rate = decode(data)
            assert 16000 <= len(samples) < 16400
            assert rate == 16000
            assert 0 <= duration(data) - len(samples) / rate < 0.05  # with its last block whole
        else:
            with pytest.raises(AudioError, match=r"container not taken: whether|can't be decoded"):
                decode(data)
        for kept in (0, 20, 0.05, 0.3, 0.6, 0.95, 0.999, len(data) - 1):
            part = data[: int(kept * len(data)) if kept < 1 else int(kept)]
            with pytest.raises(AudioError):
                decode(part)


def test_a_byte_is_missed_unless_it_only_pads() -> None:
    data, odd = (encoded(noise(1601), form="WAV", sub=sub) for sub in ("PCM_16", "PCM_U8"))
    assert len(odd) == 44 + 1601 + 1
    assert len(decode(odd[:-1])[0]) == 1601
    for cut in (data[:-1], odd[:-2]):
        with pytest.raises(AudioError, match="truncated"):
            decode(cut)


def test_an_mp3_must_say_how_many_frames_it_has() -> None:
    """Otherwise its decoder guesses: 33264 of these 80000 samples."""
    data = encoded(noise(80000), form="MP3", sub="MPEG_LAYER_III")
    first = data.index(b"\xff\xf3", 1)
    tag = b"ID3\4\0\0" + bytes([0, 0, 1, 2]) + bytes(130)
    assert len(decode(data)[0]) == len(decode(tag + data)[0]) == 80000
    for stream in (data[first:], tag + data[first:]):
        with pytest.raises(AudioError, match="its header doesn't say how long it is"):
            decode(stream)
    for lost in (1, 100, 2000):
        with pytest.raises(AudioError, match="truncated: the file ends"):
            decode((tag + data)[:-lost])


def test_what_declares_no_length_is_taken_as_it_is() -> None:
    """As programs write it that write to a pipe."""
    for form, places in (("WAV", (4, 40)), ("AU", (8,))):
        data = bytearray(encoded(noise(16000), form=form))
        for place in places:
            data[place : place + 4] = b"\xff" * 4
        assert len(decode(bytes(data))[0]) == 16000


def test_what_libraries_say_against_a_file_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(4410), rate=44100)
    for error, reason in (
        (MemoryError(), "too large: it can't be decoded in the memory there is"),
        (ValueError("odd"), "can't be decoded: odd"),
        (RuntimeError("broken."), "can't be decoded: broken$"),
    ):
        decoded = Decoded(*decode(data), "")
        with monkeypatch.context() as patch:
            patch.setattr(soundfile.SoundFile, "read", raising(error))
            patch.setattr("scipy.signal.resample_poly", raising(error))
            with pytest.raises(AudioError, match=reason):
                decode(data)
            with pytest.raises(AudioError, match=reason.replace("decoded", "converted")):
                pack(decoded)


def raising(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


def test_a_length_is_believed_within_the_limits_of_decoding() -> None:
    flac = encoded(noise(1600))
    huge = flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff" * 4 + flac[26:]
    unknown = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    assert duration(flac) == 0.1
    for data, reason in ((huge, "too large"), (unknown, "its header doesn't say how long it is")):
        for judge in (duration, decode):
            with pytest.raises(AudioError, match=reason):
                judge(data)
    with pytest.raises(AudioError, match="container not taken: whether a file of VOC"):
        duration(encoded(noise(1600), form="VOC"))


def test_what_is_not_audio_is_refused() -> None:
    with pytest.raises(AudioError, match="empty file"):
        decode(b"")
    with pytest.raises(AudioError, match="can't be decoded"):
        decode(b"this is a letter, not a sound. " * 100)
    with pytest.raises(AudioError, match="sample rate out of range: 1000 Hz"):
        decode(encoded(noise(1000), rate=1000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    samples = noise(16000)
    samples[[8000, 9000]] = value
    with pytest.raises(AudioError, match=r"NaN or infinite samples: 2, the first at 0\.500 s"):
        pack(Decoded(samples, 16000, ""))


def test_silence_and_nothing_are_refused() -> None:
    with pytest.raises(AudioError, match="no samples"):
        pack(Decoded(np.zeros(0, np.float32), 16000, ""))
    both = np.stack([np.zeros(1000), np.full(1000, 0.25)], axis=1)
    for samples in (np.zeros(1000), np.full(1000, 0.25), np.full(1000, 1e-6), both):
        for rate in (16000, 44100):  # resampled, a constant is none any more
            with pytest.raises(AudioError, match="silent"):
                pack(Decoded(samples.astype(np.float32), rate, ""))
    for rate in (16000, 44100):
        with pytest.raises(AudioError, match="silent"):
            pack(Decoded(np.full(1000, 77, np.int16), rate, ""))


def test_channels_that_cancel_each_other_are_not_called_silent() -> None:
    x, y = noise(16000), noise(16000, seed=1)
    for channels in ([x, -x], [x, -0.9 * x], [0.5 * x, y, -0.5 * x, -y]):
        for exact in (False, True):
            samples = np.stack(channels, axis=1).astype(np.float32)
            samples = (samples * 32767).astype(np.int16) if exact else samples
            with pytest.raises(
                AudioError, match=r"the channels cancel each other: .* save channel"
            ) as e:
                pack(Decoded(samples, 16000, ""))
            assert str(e.value).endswith(f"channel {2 if len(channels) == 4 else 1} alone")
    for channels in ([x, 0 * x], [x, y], [x, -0.6 * x], [0 * x] * 7 + [x], [x, x]):
        pack(Decoded(np.stack(channels, axis=1).astype(np.float32), 16000, ""))


@pytest.mark.filterwarnings("error")
def test_the_largest_floats_are_clipped_without_a_warning() -> None:
    one, largest = noise(1600), np.finfo(np.float32).max
    for samples in (one, np.stack([one, one], axis=1)):
        samples = samples.copy()
        samples[100:200] = largest
        samples[300:400] = -largest
        for rate in (16000, 48000):
            assert pack(Decoded(samples, rate, "")).clipped >= 60


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


def test_packed_audio_is_that_which_was_opened(tmp_path: Path) -> None:
    """Whatever is put in its place meanwhile; in threads, forks and spawned processes."""
    path, other = tmp_path / "audio.pcm", tmp_path / "other.pcm"
    pcm = np.arange(20_000, dtype="<i2")
    path.write_bytes(pcm.tobytes())
    audio = PackedAudio(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: audio.slice(n, 1000), range(0, 19_000, 50)))
    assert all(np.array_equal(a, pcm[n : n + 1000]) for a, n in zip(found, range(0, 19_000, 50)))
    with get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(audio.slice, (7, 3)), pcm[7:10])

    other.write_bytes(pcm[::-1].tobytes())
    os.replace(other, path)
    assert np.array_equal(audio.slice(7, 3), pcm[7:10])
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, audio.slice(7, 3).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == pcm[7:10].tobytes()
    os.close(reading)
    os.close(writing)
    with pytest.raises(DataError, match="it was replaced while it was in use"):
        pickle.loads(pickle.dumps(audio)).slice(7, 3)
    assert np.array_equal(PackedAudio(path).slice(0, 2), pcm[:-3:-1])


def test_packed_audio_gives_its_descriptor_back(tmp_path: Path) -> None:
    path = tmp_path / "audio.pcm"
    path.write_bytes(bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        PackedAudio(path).slice(0, 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("lengths", [[100, 100, 37], [100, 0, 1, 5], [1] * 20])
def test_packed_audio_goes_on_over_its_shards(tmp_path: Path, lengths: list[int]) -> None:
    pcm = np.arange(sum(lengths), dtype="<i2")
    paths = [tmp_path / shard_name(number) for number in range(len(lengths))]
    for path, part in zip(paths, np.split(pcm, np.cumsum(lengths)[:-1]), strict=True):
        part.tofile(path)
    audio = PackedAudio(*paths)
    assert len(audio) == len(pcm)
    for first in range(len(pcm) + 1):
        for last in range(first, len(pcm) + 1):
            assert np.array_equal(audio.slice(first, last - first), pcm[first:last])
    copy = pickle.loads(pickle.dumps(audio))
    assert np.array_equal(copy.slice(0, len(pcm)), pcm)
    with pytest.raises(DataError, match=f"the file has {len(pcm)}"):
        audio.slice(1, len(pcm))
    os.truncate(paths[0], 0)
    with pytest.raises(DataError, match=r"audio-0000\.pcm: packed audio can't be read: it became"):
        audio.slice(0, 1)
    paths[-1].unlink()
    with pytest.raises(DataError, match="No such file"):
        PackedAudio(*paths).slice(0, 1)


def test_more_shards_than_a_shell_s_limit_of_open_files(tmp_path: Path) -> None:
    paths = [tmp_path / shard_name(number) for number in range(40)]
    for path in paths:
        path.write_bytes(bytes(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, hard))
    try:
        assert len(PackedAudio(*paths)) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_packed_audio_slices(tmp_path: Path) -> None:
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
