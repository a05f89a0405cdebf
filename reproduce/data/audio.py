"""Audio: decode, mix down, resample, pack to 16 kHz mono int16, slice, normalize.

Shapes: T samples, C channels. What can't be used raises `AudioError`, whose message is the reason
that ends up in ``rejected`` of ``summary.json``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import re
import resource
import sys
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import soundfile

from reproduce.data.containers import UNTOLD, ContainerError, Sound, held, taken
from reproduce.errors import DataError

SAMPLE_RATE = 16_000
"""Hz, of everything packed."""
BYTES_PER_SAMPLE = 2
SHARD_SAMPLES = 2**31
"""Packed audio beyond it (4 GiB, 37 hours) lies in several files of this length."""
MIN_RATE, MAX_RATE = 4_000, 384_000
MAX_VALUES = 2**28
"""Samples x channels of one file (1 GiB as float32): 46 minutes of 48 kHz stereo."""
LOUDEST = np.float32(2**20)
"""Float samples beyond it are cut to it, so that sums of them stay finite; full scale is 1."""

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
        AudioError: empty, not audio, truncated, too large, or in a container that isn't taken.
    """
    if not data:
        raise AudioError("empty file")
    with _told(data), _opened(_Memory(data)) as file:
        sound = Sound(file.format, file.subtype, file.samplerate, file.channels, file.frames)
        try:
            part = held(sound, data)
        except ContainerError as error:
            raise AudioError(str(error)) from None
        if part.end == len(data):
            samples = _read(file, part.frames)
            if file.format == "FLAC":
                _check_md5(samples, data)
            return samples, file.samplerate
    with _opened(_Memory(data[: part.end])) as file:
        return _read(file, min(part.frames, file.frames)), file.samplerate


def _read(file: soundfile.SoundFile, frames: int) -> Float32 | Int16:
    """All frames by their number: libsndfile can't seek in some encodings (GSM, some ADPCM)."""
    exact = file.subtype == "PCM_16"
    samples: Float32 | Int16 = file.read(frames, "int16" if exact else "float32")
    if len(samples) < frames:
        raise AudioError(f"truncated: {len(samples)} of {frames} samples")
    return samples


def _check_md5(samples: Float32 | Int16, data: bytes) -> None:
    """FLAC's hash of all samples that were encoded (of 16 bits; others come as floats).

    Raises:
        AudioError: there were others, or more than its header counts.
    """
    place = data.find(b"fLaC") + 26
    expected = data[place : place + 16]
    if samples.dtype == np.int16 and any(expected):
        found = hashlib.md5(samples.astype("<i2", copy=False).data, usedforsecurity=False)
        if found.digest() != expected:
            raise AudioError("damaged: these aren't all the samples that its hash (MD5) is of")


def duration(file: Path | bytes) -> float:
    """Seconds of a file, or of its bytes, by the header alone.

    Raises:
        AudioError: `decode` would refuse it for what its header says.
    """
    with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as source:
        head = source.read(4)
    with _told(head), _opened(_Memory(file) if isinstance(file, bytes) else file) as opened:
        return float(opened.frames / opened.samplerate)


@contextmanager
def _opened(source: io.BytesIO | Path) -> Iterator[soundfile.SoundFile]:
    """The open file, if its header says nothing that can't be used."""
    with _reasons("decoded"), soundfile.SoundFile(source) as file:
        rate, channels, frames = file.samplerate, file.channels, file.frames
        if not taken(file.format):
            raise AudioError(
                f"container not taken: whether a file of {file.format} lost its end can't be "
                "checked; convert it to FLAC or WAV"
            )
        if not MIN_RATE <= rate <= MAX_RATE:
            raise AudioError(f"sample rate out of range: {rate} Hz, {MIN_RATE} to {MAX_RATE} taken")
        if frames >= 2**62:  # libsndfile's way to say that it can't tell
            raise AudioError(UNTOLD)
        if frames * channels > MAX_VALUES:
            raise AudioError(
                f"too large: {frames} samples x {channels} channels declared, the limit is "
                f"{MAX_VALUES} in all; cut it into utterances"
            )
        yield file


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Whatever a library says against a file is a reason not to use it."""
    try:
        yield
    except AudioError:
        raise
    except MemoryError:
        raise AudioError(f"too large: it can't be {what} in the memory there is") from None
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        reason = getattr(error, "error_string", "") or str(error)
        raise AudioError(f"can't be {what}: {reason.strip().rstrip('.')}") from None


@contextmanager
def _told(head: bytes) -> Iterator[None]:
    """What libmpg123 writes to the screen about an MP3, which names no file, becomes a reason.

    It also tells of what costs no sample (sizes that are a little off, bytes passed over); only
    its errors count. Samples that were lost are counted where they are read.

    Args:
        head: how the file begins; of others nothing is caught.
    """
    if not (head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")):
        yield
        return
    with _SCREEN, _scratch() as caught:
        sys.stderr.flush()
        screen = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
        caught.seek(0)
        if error := re.search(r"\berror: ([^\n]*)", caught.read().decode("utf-8", "replace")):
            raise AudioError(f"damaged: {error[1].strip()}")


_SCREEN = threading.Lock()
"""Of whoever catches what is written to it."""


def _scratch() -> IO[bytes]:
    """A file that nothing is lost of where the disk is full: in memory, where a system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("libmpg123"), "w+b")
    return tempfile.TemporaryFile()


class _Memory(io.BytesIO):
    """Bytes to libsndfile, which a damaged header can send to a place before the beginning."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()  # libsndfile looks where it is


def pack(decoded: Decoded) -> Packed:
    """Check, mix down (mean of the channels), resample and round to int16.

    Raises:
        AudioError: no samples, samples that aren't finite, or silence.
    """
    if not len(decoded.samples):
        raise AudioError("no samples")
    with _reasons("converted"):
        channels = 1 if decoded.samples.ndim == 1 else decoded.samples.shape[1]
        mono = _mixed_down(decoded, channels)
        _refuse_cancelled(mono, decoded.samples)
        _refuse_silence(mono)  # before resampling, which makes ripples of a constant's ends
        if mono.dtype == np.int16 and decoded.rate == SAMPLE_RATE:
            pcm, clipped = mono.astype("<i2", copy=False), 0
        else:
            pcm, clipped = to_int16(resample(_floats(mono), decoded.rate))
            _refuse_silence(pcm)
        return Packed(pcm, decoded.sha256, decoded.rate, channels, clipped)


def _mixed_down(decoded: Decoded, channels: int) -> Float32 | Int16:
    """[T], float32 or, of one channel, as it was."""
    raw = decoded.samples
    if raw.dtype != np.int16:
        raw = raw.astype(np.float32, copy=False)
        low, high = raw.min(), raw.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(raw.reshape(len(raw), -1)).all(axis=1))
            first = bad[0] / decoded.rate
            raise AudioError(f"NaN or infinite samples: {len(bad)}, the first at {first:.3f} s")
        if max(-low, high) > LOUDEST:
            raw = raw.clip(-LOUDEST, LOUDEST)
    if channels == 1:
        return raw.reshape(-1)
    mono: Float32 = _floats(raw).mean(axis=1, dtype=np.float32)
    return mono


def _refuse_cancelled(mono: Float32 | Int16, channels: Float32 | Int16) -> None:
    """Channels of opposite phase cancel in their mean.

    Where all of C channels but one are silent, their mean has a C-th of its loudness (RMS), and
    independent ones have more: a mean with less than a fifth of that was cancelled.
    """
    if channels.ndim == 1 or channels.shape[1] == 1:
        return
    loudness = [_rms(_floats(channel).clip(-LOUDEST, LOUDEST)) for channel in channels.T]
    loudest = max(loudness)
    if _rms(mono) * len(loudness) < 0.2 * loudest:
        raise AudioError(
            "the channels cancel each other: in opposite phase, their mean is all but silent; save "
            f"channel {1 + loudness.index(loudest)} alone"
        )


def _rms(samples: Float32 | Int16) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def _floats(samples: Float32 | Int16) -> Float32:
    if samples.dtype == np.int16:
        return to_float(samples)
    return samples.astype(np.float32, copy=False)


def _refuse_silence(samples: Float32 | Int16) -> None:
    if samples.min() == samples.max():
        raise AudioError("silent: every sample is the same")


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


def shard_name(number: int) -> str:
    """File of a shard under ``data/``, where there are several."""
    return f"audio-{number:04}.pcm"


class PackedAudio:
    """Random access to packed audio (mono int16, 16 kHz) in one file or in shards.

    Offsets go on over the shards, and a slice may lie across a border. The files are opened once,
    so that what another process puts in their place isn't read. A copy in another process (pickled)
    opens them again, and refuses other files.

    Slices are read, not mapped: random access through a memory map faults page by page once the
    file is large (ten times slower at 100 h than at 1 h), and its pages count as the process's own.

    Args:
        paths: of the shards, in order.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self._opened: list[int] = []
        self._ends: list[int] = []
        self._known: list[tuple[int, int]] | None = None
        with suppress(DataError):  # told when it is asked for samples
            self.files()

    def __len__(self) -> int:
        """Samples in all files."""
        self.files()
        return self._ends[-1] if self._ends else 0

    def slice(self, offset: int, samples: int) -> Int16:
        """int16 [samples] from `offset` on.

        Raises:
            DataError: a file is missing, is another one than before, or ends before the slice.
        """
        size = len(self)
        if not 0 <= offset <= offset + samples <= size:
            raise DataError(
                f"samples {offset} to {offset + samples} asked for, the file has {size}",
                where=str(self.paths[-1]),
                do="it doesn't belong to this manifest: prepare it again with `w2vrep prepare`",
            )
        pcm = np.empty(samples, "<i2")
        done = 0
        shard = bisect_right(self._ends, offset)
        while done < samples:
            here = min(samples - done, self._ends[shard] - offset)
            start = self._ends[shard - 1] if shard else 0
            self._read(shard, offset - start, pcm[done : done + here])
            done, offset, shard = done + here, offset + here, shard + 1
        return pcm

    def _read(self, shard: int, offset: int, pcm: Int16) -> None:
        """Fill `pcm` from `offset` of a shard on."""
        rest, place = pcm.view(np.uint8).data, offset * BYTES_PER_SAMPLE
        while rest:
            try:
                read = os.preadv(self._opened[shard], [rest], place)
            except OSError as error:
                raise _unreadable(self.paths[shard], error.strerror) from None
            if not read:
                raise _unreadable(self.paths[shard], "it became shorter")
            rest, place = rest[read:], place + read

    def files(self) -> list[int]:
        """The descriptors, which reading by position shares between threads and forks.

        Raises:
            DataError: a file can't be opened, or is another one than before.
        """
        if not self._opened:
            opened = _open_all(self.paths)
            weakref.finalize(self, _close_all, opened)
            found = [(s.st_ino, s.st_size) for s in map(os.fstat, opened)]
            for path, before, now in zip(self.paths, self._known or found, found, strict=True):
                if before != now:
                    raise _unreadable(path, "it was replaced while it was in use")
            self._known = found
            self._ends = list(accumulate(size // BYTES_PER_SAMPLE for _, size in found))
            self._opened = opened
        return self._opened

    def by_name(self) -> dict[str, int]:
        """File name -> descriptor."""
        return {path.name: file for path, file in zip(self.paths, self.files(), strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": []}


def _open_all(paths: Sequence[Path]) -> list[int]:
    """Open files for reading; all or none."""
    allow_open_files(len(paths))
    opened: list[int] = []
    try:
        for path in paths:
            opened.append(os.open(path, os.O_RDONLY))
    except OSError as error:
        _close_all(opened)
        if error.errno == errno.EMFILE:
            raise DataError(
                f"{len(paths)} files of packed audio are more than this process may open",
                where=str(path.parent),
                do="raise the hard limit of open files (`ulimit -Hn`)",
            ) from None
        raise _unreadable(path, error.strerror) from None
    return opened


def _close_all(opened: list[int]) -> None:
    for file in opened:
        os.close(file)


def allow_open_files(count: int) -> None:
    """See to it that this process may have so many more files open, as far as the system lets it.

    A shell allows 1024 of its own accord; 60000 h of audio are 1600 shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count + 256
    if soft != resource.RLIM_INFINITY and needed > soft:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _unreadable(path: Path, reason: str | None) -> DataError:
    return DataError(
        f"packed audio can't be read: {reason}",
        where=str(path),
        do="prepare it again with `w2vrep prepare`",
    )
