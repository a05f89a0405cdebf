"""Audio: decode, mix down, resample, pack to 16 kHz mono int16, slice, normalize.

Shapes: T samples, C channels. What can't be used raises `AudioError`, whose message is the reason
that ends up in ``rejected`` of ``summary.json``.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from reproduce.errors import DataError

SAMPLE_RATE = 16_000
"""Hz, of everything packed."""
BYTES_PER_SAMPLE = 2
MIN_RATE, MAX_RATE = 4_000, 384_000
MAX_VALUES = 2**28
"""Samples x channels of one file (1 GiB as float32): 46 minutes of 48 kHz stereo."""

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


class AudioError(ValueError):
    """Audio that can't be used; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    """Decoded audio: samples [T] or [T, C], rate in Hz, SHA-256 of the source's bytes.

    Samples are float32 in -1..1 (float formats may exceed it), or int16 of a 16-bit source.
    """

    samples: Float32 | Int16
    rate: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """Audio ready to be packed: 16 kHz mono int16 [T], and what it was made from.

    `clipped` counts the samples that lay outside -1..1.
    """

    samples: Int16
    sha256: str
    rate: int
    channels: int
    clipped: int


def decode(data: bytes) -> tuple[Float32 | Int16, int]:
    """Decode a whole audio file held in memory, whatever its name says.

    Returns:
        samples as `Decoded` has them, and the rate in Hz.

    Raises:
        AudioError: empty, not audio, truncated, or too large.
    """
    if not data:
        raise AudioError("empty file")
    try:
        with soundfile.SoundFile(_Memory(data)) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            if not MIN_RATE <= rate <= MAX_RATE:
                raise AudioError(f"sample rate {rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
            if frames >= 2**62:  # libsndfile's way to say that it can't tell
                raise AudioError("its header doesn't say how long it is; encode it again")
            if frames * channels > MAX_VALUES:
                raise AudioError(
                    f"too large: {frames} samples x {channels} channels declared, the limit is "
                    f"{MAX_VALUES} in all; cut it into utterances"
                )
            exact = file.subtype == "PCM_16"
            samples: Float32 | Int16 = file.read(dtype="int16" if exact else "float32")
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", "") or str(error)
        raise AudioError(f"can't be decoded: {reason.strip().rstrip('.')}") from None
    if len(samples) < frames:
        raise AudioError(f"truncated: {len(samples)} of {frames} samples")
    if _cut_short(data):
        raise AudioError("truncated: the file ends before its container says it does")
    return samples, rate


class _Memory(io.BytesIO):
    """Bytes to libsndfile, which a damaged header can send to a place before the beginning."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()  # libsndfile looks where it is


def duration(file: Path | bytes) -> float:
    """Seconds of a file, or of its bytes, by the header alone.

    Raises:
        AudioError: it can't be read.
    """
    try:
        info = soundfile.info(_Memory(file) if isinstance(file, bytes) else file)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"can't be decoded: {error}") from None
    return float(info.frames / info.samplerate)


def _cut_short(data: bytes) -> bool:
    """Whether a WAV, AIFF or Ogg file lost its end, which libsndfile takes for a shorter file.

    WAV, AIFF: the size at the start exceeds the file (one near 2^31 or 2^32 means a stream of
    unknown length). Ogg: the last page is incomplete or doesn't end its stream (RFC 3533).
    """
    if data[:4] in (b"RIFF", b"FORM"):
        size = int.from_bytes(data[4:8], "little" if data[:1] == b"R" else "big")
        return len(data) + 1 < size + 8 and size < 0x7FFF0000
    if data[:4] == b"OggS":
        page = data[data.rfind(b"OggS") :]
        if len(page) < 27 or len(page) < 27 + page[26]:
            return True
        return not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    return False


def pack(decoded: Decoded) -> Packed:
    """Check, mix down (mean of the channels), resample and round to int16.

    Raises:
        AudioError: no samples, samples that aren't finite, or silence.
    """
    if not len(decoded.samples):
        raise AudioError("no samples")
    channels = 1 if decoded.samples.ndim == 1 else decoded.samples.shape[1]
    if decoded.samples.dtype == np.int16 and channels == 1 and decoded.rate == SAMPLE_RATE:
        pcm, clipped = decoded.samples.astype("<i2", copy=False), 0
    else:
        pcm, clipped = _converted(decoded, channels)
    if pcm.min() == pcm.max():
        raise AudioError("silent: every sample is the same")
    return Packed(pcm, decoded.sha256, decoded.rate, channels, clipped)


def _converted(decoded: Decoded, channels: int) -> tuple[Int16, int]:
    raw = decoded.samples
    samples = to_float(raw) if raw.dtype == np.int16 else raw.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.reshape(-1) if channels == 1 else samples.mean(axis=1, dtype=np.float32)
    low, high = samples.min(), samples.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(samples))
        first = bad[0] / decoded.rate
        raise AudioError(f"{len(bad)} samples are NaN or infinite, the first at {first:.3f} s")
    return to_int16(resample(samples, decoded.rate))


def resample(samples: Float32, rate: int) -> Float32:
    """Resample float32 [T] from `rate` to 16 kHz: float32 [ceil(T * 16000 / rate)].

    Polyphase, with a windowed sinc of 16 zero crossings a side (Kaiser, stop band -65 dB, -6 dB at
    0.95 of the lower Nyquist frequency). scipy keeps worker processes free of torch, and takes any
    rate (torchaudio builds a kernel of rate x 16000 values where the two share no factor).
    """
    if rate == SAMPLE_RATE:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    resampled: Float32 = resample_poly(samples, up, down, window=_lowpass(max(up, down)))
    return resampled


@lru_cache(maxsize=4)
def _lowpass(factor: int) -> Float32:
    from scipy.signal import firwin

    taps = firwin(2 * 16 * factor + 1, 0.95 / factor, window=("kaiser", 6.0))
    return np.asarray(taps, dtype=np.float32)


def to_int16(samples: Float32) -> tuple[Int16, int]:
    """Round float32 [T] to little-endian int16 [T]; 16-bit sources come back bit for bit.

    Returns:
        the samples, and how many lay outside -1..1 and were clipped.
    """
    scaled = samples * np.float32(32768)
    np.rint(scaled, out=scaled)
    clipped = 0
    if scaled.min() < -32768 or scaled.max() > 32767:
        clipped = int(np.count_nonzero(np.abs(samples) > 1))
        np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype("<i2"), clipped


def to_float(pcm: Float32 | Int16) -> Float32:
    """int16 [T] to float32 [T] in -1..1."""
    return pcm.astype(np.float32) / np.float32(32768)


def normalize(samples: Float32) -> Float32:
    """Zero mean and unit variance over one utterance, float32 [T].

    ``(x - mean) / sqrt(var + 1e-7)``, as transformers' Wav2Vec2FeatureExtractor does. A crop is
    normalized by itself, after cropping.
    """
    normalized: Float32 = (samples - samples.mean()) / np.sqrt(samples.var() + np.float32(1e-7))
    return normalized


class PackedAudio:
    """Random access to ``audio.pcm`` (mono int16, 16 kHz).

    Slices are read, not mapped: random access through a memory map faults page by page once the
    file is large (ten times slower at 100 h than at 1 h), and its pages count as the process's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        """Samples in the file."""
        return self.path.stat().st_size // BYTES_PER_SAMPLE

    def slice(self, offset: int, samples: int) -> Int16:
        """int16 [samples] from `offset` on.

        Raises:
            DataError: the file is missing, or ends before the slice does.
        """
        try:
            size = len(self)
            if 0 <= offset <= offset + samples <= size:
                return np.fromfile(self.path, "<i2", samples, offset=offset * BYTES_PER_SAMPLE)
        except OSError as error:
            raise DataError(
                f"packed audio can't be read: {error}",
                where=str(self.path),
                do="prepare it again with `w2vrep prepare`",
            ) from None
        raise DataError(
            f"samples {offset} to {offset + samples} asked for, the file has {size}",
            where=str(self.path),
            do="it doesn't belong to this manifest: prepare it again with `w2vrep prepare`",
        )
