"""Audio containers: which ones are taken, and how many bytes a file of one must have.

libsndfile takes most files that were cut for shorter ones. So only containers are taken whose
length can be checked: they declare it, or their last page shows it. Those that may declare an
unknown length, as programs do that write to a pipe, are then taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

UNKNOWN_32 = 0x7FFF0000
"""Sizes of 32 bits from here on are written by programs that don't know the size."""


def taken(form: str) -> bool:
    """Whether files of a container, by libsndfile's name of it, are taken."""
    return form in _ENDS


def declared_end(form: str, data: bytes) -> int | None:
    """Bytes that a file of a container that is taken must have, at least; None: it can't be told.

    0 where its decoder checks the length, or it declares that none is known.
    """
    return _ENDS[form](data)


def _riff(data: bytes) -> int:
    """WAV, AIFF, 8SVX: the outer chunk's size; an odd last chunk may lack its pad byte."""
    order: Literal["little", "big"] = "little" if data[:4] == b"RIFF" else "big"
    size = int.from_bytes(data[4:8], order)
    if size >= UNKNOWN_32:
        return 0
    place, last = 12, 0
    while place + 8 <= len(data):
        last = int.from_bytes(data[place + 4 : place + 8], order)
        place += 8 + last + last % 2
    return size + 8 - last % 2


def _rf64(data: bytes) -> int:
    """EBU Tech 3306: the size in the chunk ds64."""
    size = int.from_bytes(data[20:28], "little") if data[12:16] == b"ds64" else 0
    return size + 8 if size < 2**62 else 0


def _w64(data: bytes) -> int:
    """Sony Wave64: the size of the whole file, after the first GUID."""
    size = int.from_bytes(data[16:24], "little")
    return size if size < 2**62 else 0


def _au(data: bytes) -> int:
    """Sun audio: offset and size of the samples; all ones where unknown."""
    order: Literal["little", "big"] = "little" if data[:4] == b"dns." else "big"
    offset, size = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
    return offset + size if size < 0xFFFFFFFF else 0


def _nist(data: bytes) -> int | None:
    """NIST SPHERE: a text header of the size in its second line."""
    header = re.match(rb"NIST_1A\s+(\d{1,9})\s", data)
    if header is None:
        return None
    size, end = int(header[1]), 1
    for field in (rb"sample_count", rb"channel_count", rb"sample_n_bytes"):
        value = re.search(rb"\s" + field + rb" -[is]\d* (\d{1,15})\s", data[:size])
        if value is None:
            return None
        end *= int(value[1])
    return size + end


def _caf(data: bytes) -> int:
    """Core Audio: chunk by chunk; the samples' may say that it goes to the file's end (-1)."""
    place = 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 12], "big", signed=True)
        if size < 0:
            return 0
        place += 12 + size
    return place


def _ogg(data: bytes) -> int:
    """RFC 3533: the last page is whole and ends its stream."""
    start = max(data.rfind(b"OggS"), 0)
    page = data[start:]
    if len(page) < 27 or len(page) < 27 + page[26] or not page[5] & 4:
        return len(data) + 1
    return start + 27 + page[26] + sum(page[27 : 27 + page[26]])


def _mp3(data: bytes) -> int | None:
    """The Xing or Info header, in the first frame: the number of frames, which its decoder checks,
    and of bytes. Without it the decoder guesses the length, and reads as much as it guessed.
    """
    first = 0
    if data[:3] == b"ID3":
        first = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(data[6:10]))
    header = re.search(rb"(?:Xing|Info)(.{4}).{4}(.{4})", data[first : first + 52], re.DOTALL)
    if header is None or not header[1][3] & 1:
        return None
    return first + int.from_bytes(header[2], "big") if header[1][3] & 2 else 0


def _by_its_decoder(data: bytes) -> int:
    """FLAC declares its samples, HTK is known by its size."""
    return 0


_ENDS: dict[str, Callable[[bytes], int | None]] = {
    "FLAC": _by_its_decoder, "HTK": _by_its_decoder,
    "WAV": _riff, "WAVEX": _riff, "AIFF": _riff, "SVX": _riff,
    "RF64": _rf64, "W64": _w64, "AU": _au, "NIST": _nist, "CAF": _caf, "OGG": _ogg, "MP3": _mp3,
}  # fmt: skip
"""libsndfile's name of a container -> bytes that a file of it must have."""
