"""Audio containers: which ones are taken, and whether a file of one holds what it declares.

libsndfile takes most files that were cut for shorter ones, and some of what lies behind the samples
for samples. So only containers are taken whose length can be checked, and what decides is where
their samples really lie, chunk by chunk: sizes of the whole (RIFF, FORM, riff) are often left wrong
and lose nothing. Where a program that wrote to a pipe left a size open, all that is there counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

JOINED = "several sounds one behind the other: only the first would be decoded; join them decoded"
UNTOLD = "its header doesn't say how long it is; encode it again"

BYTES = {
    "PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8,
    "ULAW": 1, "ALAW": 1,
}  # fmt: skip
"""libsndfile's name of an encoding -> bytes a sample, where all samples take the same."""
READ_ON = {"W64", "NIST", "SVX"}
"""Containers of which libsndfile decodes to the end of the file, whatever they declare."""
LAX = {"WAV", "WAVEX"}
"""Containers that count samples for compressed encodings; for others the number is often wrong."""
METADATA = {
    b"LIST", b"fact", b"cue ", b"PEAK", b"smpl", b"inst", b"bext", b"iXML", b"id3 ", b"ID3 ",
    b"JUNK", b"junk", b"PAD ", b"FLLR", b"afsp", b"axml", b"_PMX", b"DISP", b"plst", b"acid",
    b"MARK", b"COMT", b"INST", b"APPL", b"NAME", b"AUTH", b"ANNO", b"(c) ", b"FVER", b"free",
    b"info", b"pakt", b"summ",
}  # fmt: skip
"""Chunks that hold no samples, so that nothing is lost where one is cut."""
WHOLES = {b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff"}
SPARE_SECONDS = 0.1
"""What lies behind the samples and is no chunk is passed over if it is shorter as sound."""


class ContainerError(ValueError):
    """A file that doesn't hold what it declares; the message is the reason."""


@dataclass(frozen=True)
class Sound:
    """What libsndfile makes of a file: its names of container and encoding, and numbers."""

    form: str
    subtype: str
    rate: int
    channels: int
    frames: int


@dataclass(frozen=True)
class Held:
    """What of a file are its samples.

    Attributes:
        frames: so many, a channel; what the last block of a compressed encoding adds is left out.
        end: so many bytes of the file are for the decoder.
    """

    frames: int
    end: int


@dataclass(frozen=True)
class _Extent:
    """Where a container says that its samples lie.

    Attributes:
        start: their first byte.
        size: so many bytes; None where it is left open.
        behind: the first byte behind them and the chunks that follow.
        samples: so many a channel, in another field; None where there is none, or it is left open.
        block: samples a block of a compressed encoding.
    """

    start: int
    size: int | None
    behind: int
    samples: int | None = None
    block: int = 1


def taken(form: str) -> bool:
    """Whether files of a container, by libsndfile's name of it, are taken."""
    return form in _EXTENTS


def held(sound: Sound, data: bytes) -> Held:
    """Which part of a file in a container that is taken are its samples.

    Raises:
        ContainerError: it was cut, holds more than it declares, or doesn't say how much.
    """
    extent = _EXTENTS[sound.form](data)
    if extent is None:
        return Held(sound.frames, len(data))
    there = len(data) - extent.start
    size = there if extent.size is None else extent.size
    if size > there:
        raise ContainerError("truncated: the file ends before its container says it does")
    frame = BYTES.get(sound.subtype, 0) * sound.channels
    if extent.size is not None:
        _check_behind(data, extent, sound, frame * sound.rate * SPARE_SECONDS)
    end = extent.start + size if sound.form in READ_ON else len(data)
    if frame:
        frames = _fixed(sound, extent, size // frame)
    else:
        frames = _compressed(sound, extent)
    return Held(frames, end)


def _fixed(sound: Sound, extent: _Extent, frames: int) -> int:
    """Of an encoding whose samples all take the same, `frames` of which are there."""
    spare = SPARE_SECONDS * sound.rate
    declared = None if sound.form in LAX else extent.samples
    if declared is not None and declared > frames + spare:
        raise ContainerError(f"truncated: {declared} samples declared, {frames} are there")
    _check_decoded(sound, frames - spare)
    return min(frames, sound.frames)


def _check_decoded(sound: Sound, least: float) -> None:
    """A size that the decoder goes by may say less than those that tell where the samples lie."""
    if sound.frames < least:
        raise ContainerError(
            f"its sizes contradict each other: {sound.frames} samples by one, {least:.0f} or more "
            "by another; encode it again"
        )


def _compressed(sound: Sound, extent: _Extent) -> int:
    """Of blocks, the last of which is filled up; the header may say how many samples are real."""
    samples, last = extent.samples, 2 * max(extent.block, 320)
    if sound.subtype == "GSM610" and extent.size is not None:  # 160 samples in 33 bytes at most
        _check_decoded(sound, extent.size * 160 // 33 - last)
    if samples is None or samples in (0, sound.frames * sound.channels):
        return sound.frames
    if samples > sound.frames + last:
        raise ContainerError(f"truncated: {samples} samples declared, {sound.frames} are there")
    return samples if sound.frames - last < samples <= sound.frames else sound.frames


def _check_behind(data: bytes, extent: _Extent, sound: Sound, spare: float) -> None:
    """What lies behind the samples are chunks, tags, or a little of something."""
    assert extent.size is not None
    if not spare and sound.frames:
        spare = SPARE_SECONDS * sound.rate * extent.size / sound.frames
    rest = _unexplained(data, extent.behind)
    if not extent.size and rest:
        raise ContainerError(
            f"its header declares no samples: data size 0, and {rest} bytes behind it; it was "
            "written by a program that didn't finish: repair the header, or record it again"
        )
    if rest > spare:
        raise ContainerError(
            f"its header declares less than there is: {extent.size} bytes of samples, and {rest} "
            "more behind them; it was never finished, or files were joined: encode it again"
        )


def _unexplained(data: bytes, place: int) -> int:
    """Bytes from `place` on that are neither padding nor a tag."""
    rest = data[place:].lstrip(b"\0")
    while True:
        if rest[:3] == b"ID3" and len(rest) >= 10:
            length = 10 + _syncsafe(rest[6:10])
        elif rest[:8] == b"APETAGEX" and len(rest) >= 32:
            length = 32 + int.from_bytes(rest[12:16], "little")
        elif rest[:3] == b"TAG":
            length = 128
        else:
            return len(rest.rstrip(b"\0"))
        rest = rest[length:].lstrip(b"\0")


def _open_32(size: int, least: int = 0x7FFF0000) -> bool:
    """A size that a program writes which doesn't know it: all ones, or the largest number with a
    sign, less a header. (No file of such a size is read.)"""
    return least <= size <= 0x80000000 or size >= 0xFFFF0000


def _open_64(size: int) -> bool:
    """The same of 64 bits, of which programs leave open the largest numbers too."""
    return 2**63 - 2**16 <= size <= 2**63 or size >= 2**64 - 2**16


def _known(size: int, is_open: bool) -> int | None:
    return None if is_open else size


# ------------------------------------------------------------------------------------------ chunks

Order = Literal["little", "big"]
Chunk = tuple[bytes, int, int]
"""Name, first byte of what it holds, bytes it says it holds."""


def _chunks(data: bytes, place: int, order: Order) -> Iterator[Chunk]:
    """Chunks of RIFF and IFF: name, size, padded to an even number of bytes."""
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], order)
        yield data[place : place + 4], place + 8, size
        place += 8 + size + size % 2


def _w64_chunks(data: bytes, place: int) -> Iterator[Chunk]:
    """Chunks of Wave64: a GUID, a size that counts the head, padded to eight bytes."""
    while place + 24 <= len(data):
        size = max(int.from_bytes(data[place + 16 : place + 24], "little"), 24)
        yield data[place : place + 4], place + 24, size - 24
        place += -(-size // 8) * 8


def _caf_chunks(data: bytes, place: int) -> Iterator[Chunk]:
    """Chunks of Core Audio: name, size of 64 bits; -1 goes to the file's end."""
    while place + 12 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 12], "big", signed=True)
        yield data[place : place + 4], place + 12, size
        if size < 0:
            return
        place += 12 + size


def _behind(data: bytes, end: int, chunks: Iterator[Chunk], samples: bytes) -> int:
    """Where the chunks end that follow the samples, which end at `end`.

    Raises:
        ContainerError: one of them holds samples too.
    """
    for name, start, size in chunks:
        whole = start + size <= len(data)
        if name in WHOLES or not (name in METADATA or (whole and _is_name(name))):
            break
        if name == samples and size:
            raise ContainerError(
                "several chunks of samples: only one of them would be decoded; encode it again"
            )
        end = min(start + max(size, 0), len(data))
    return end


def _is_name(name: bytes) -> bool:
    return all(0x20 <= byte < 0x7F for byte in name)


def _riff(data: bytes) -> _Extent:
    """WAV, of either byte order: the chunk data, and how many samples fact says there are."""
    order: Order = "big" if data[:4] == b"RIFX" else "little"
    samples, block, outer = None, 1, int.from_bytes(data[4:8], order)
    for name, start, size in _chunks(data, 12, order):
        if name == b"fmt " and size >= 20:
            block = int.from_bytes(data[start + 18 : start + 20], order)
        elif name == b"fact" and size >= 4:
            count = int.from_bytes(data[start : start + 4], order)
            samples = _known(count, _open_32(count))
        elif name == b"data":
            if not _open_32(size):
                end = start + size
                behind = _behind(data, end, _chunks(data, end + size % 2, order), name)
                return _Extent(start, size, behind, samples, block)
            if not _open_32(outer) and outer + 8 > len(data) + 1:
                raise ContainerError("truncated: the file ends before its container says it does")
            return _Extent(start, None, len(data), samples, block)
    raise ContainerError(UNTOLD)


def _rf64(data: bytes) -> _Extent:
    """EBU Tech 3306: sizes of 64 bits in the chunk ds64."""
    if data[12:16] != b"ds64":
        raise ContainerError(UNTOLD)
    long, samples = (int.from_bytes(data[at : at + 8], "little") for at in (28, 36))
    for name, start, size in _chunks(data, 12, "little"):
        if name == b"data":
            if not _open_32(size):
                long = max(long, size)
            if _open_64(long):
                return _Extent(start, None, len(data))
            end = start + long
            behind = _behind(data, end, _chunks(data, end + long % 2, "little"), name)
            return _Extent(start, long, behind, _known(samples, samples >= 2**62))
    raise ContainerError(UNTOLD)


def _w64(data: bytes) -> _Extent:
    """Sony Wave64."""
    samples = None
    for name, start, size in _w64_chunks(data, 40):
        if name == b"fact":
            count = int.from_bytes(data[start : start + 8], "little")
            samples = _known(count, count >= 2**62)
        elif name == b"data":
            if _open_64(size + 24):
                return _Extent(start, None, len(data), samples)
            end = start + size
            chunks = _w64_chunks(data, start + -(-size // 8) * 8)
            return _Extent(start, size, _behind(data, end, chunks, name), samples)
    raise ContainerError(UNTOLD)


def _aiff(data: bytes) -> _Extent:
    """AIFF and AIFF-C: the chunk SSND; COMM, which may follow it, counts samples too."""
    samples, extent = None, None
    for name, start, size in _chunks(data, 12, "big"):
        if name == b"COMM":
            count = int.from_bytes(data[start + 2 : start + 6], "big")
            samples = _known(count, _open_32(count, 0x7F000000))
        elif name == b"SSND" and extent is None:
            first = start + 8 + int.from_bytes(data[start : start + 4], "big")
            if _open_32(size, 0x7F000000):
                extent = _Extent(first, None, len(data))
                break
            end = start + size
            behind = _behind(data, end, _chunks(data, end + size % 2, "big"), name)
            extent = _Extent(first, max(end - first, 0), behind)
    if extent is None:
        raise ContainerError(UNTOLD)
    return _Extent(extent.start, extent.size, extent.behind, samples)


def _svx(data: bytes) -> _Extent:
    """Amiga 8SVX and 16SV: the chunk BODY."""
    for name, start, size in _chunks(data, 12, "big"):
        if name == b"BODY":
            if _open_32(size):
                return _Extent(start, None, len(data))
            end = start + size
            behind = _behind(data, end, _chunks(data, end + size % 2, "big"), name)
            return _Extent(start, size, behind)
    raise ContainerError(UNTOLD)


def _caf(data: bytes) -> _Extent:
    """Core Audio: the chunk data, four bytes of which count edits."""
    for name, start, size in _caf_chunks(data, 8):
        if name == b"data":
            if size < 0:
                return _Extent(start + 4, None, len(data))
            end = start + size
            behind = _behind(data, end, _caf_chunks(data, end), name)
            return _Extent(start + 4, max(size - 4, 0), behind)
    raise ContainerError(UNTOLD)


# ----------------------------------------------------------------------------------------- headers


def _au(data: bytes) -> _Extent:
    """Sun audio: offset and size of the samples; all ones where unknown."""
    order: Order = "little" if data[:4] == b"dns." else "big"
    offset, size = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
    start = max(offset, 24)
    return _Extent(start, _known(size, _open_32(size)), start + size)


def _nist(data: bytes) -> _Extent:
    """NIST SPHERE: a text header of the size in its second line."""
    header = re.match(rb"NIST_1A\s+(\d{1,9})\s", data)
    if header is None:
        raise ContainerError(UNTOLD)
    start, size = int(header[1]), 1
    for field in (rb"sample_count", rb"channel_count", rb"sample_n_bytes"):
        value = re.search(rb"\s" + field + rb" -[is]\d* (\d{1,15})\s", data[:start])
        if value is None:
            raise ContainerError(UNTOLD)
        size *= int(value[1])
    return _Extent(start, size, start + size)


# ----------------------------------------------------------------------------------------- streams


def _ogg(data: bytes) -> None:
    """RFC 3533: the last page is whole and ends its stream; no other stream begins behind one."""
    start = max(data.rfind(b"OggS"), 0)
    page = data[start:]
    if len(page) < 27 or len(page) < 27 + page[26] or not page[5] & 4:
        raise ContainerError("truncated: the file ends before its last page does")
    if len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise ContainerError("truncated: the file ends before its last page does")
    place, ended = 0, False
    while place + 27 <= len(data):
        flags = data[place + 5]
        if ended and flags & 2:
            raise ContainerError(JOINED)
        ended = ended or bool(flags & 4)
        lengths = data[place + 27 : place + 27 + data[place + 26]]
        place = data.find(b"OggS", place + 27 + len(lengths) + sum(lengths))
        if place < 0:
            break


def _mp3(data: bytes) -> _Extent:
    """The Xing or Info header, in the first frame: the number of frames, which its decoder checks,
    and of bytes. Without it the decoder guesses the length, and reads as much as it guessed.
    """
    first = 0
    if data[:3] == b"ID3":
        first = 10 + _syncsafe(data[6:10])
    header = re.search(rb"(?:Xing|Info)(.{4})(.{4})(.{4})", data[first : first + 52], re.DOTALL)
    if header is None or not header[1][3] & 1:
        raise ContainerError(UNTOLD)
    flags, count, size = header.groups()
    frame = 1152 if data[first + 1 : first + 2] >= b"\xf8" else 576  # MPEG 1, or 2 and 2.5
    samples = int.from_bytes(count, "big") * frame
    length = int.from_bytes(size, "big") if flags[3] & 2 else 0
    if not length:
        return _Extent(first, None, len(data), samples, 2 * frame)
    # A frame more or less is usual.
    return _Extent(first, length, first + length + 1500, samples, 2 * frame)


def _syncsafe(number: bytes) -> int:
    return sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(number))


def _flac(data: bytes) -> None:
    """Declares its samples, which its decoder checks; of joined files it reads the first alone."""
    if data.find(b"fLaC\0\0\0\x22", 8) > 0:
        raise ContainerError(JOINED)


def _by_its_decoder(data: bytes) -> None:
    """HTK is known by its size."""


_EXTENTS: dict[str, Callable[[bytes], _Extent | None]] = {
    "FLAC": _flac, "HTK": _by_its_decoder,
    "WAV": _riff, "WAVEX": _riff, "AIFF": _aiff, "SVX": _svx,
    "RF64": _rf64, "W64": _w64, "AU": _au, "NIST": _nist, "CAF": _caf, "OGG": _ogg, "MP3": _mp3,
}  # fmt: skip
"""libsndfile's name of a container -> where its samples lie; None: its decoder checks the rest."""
