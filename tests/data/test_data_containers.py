"""What a file really holds decides, whatever its other sizes say."""

from __future__ import annotations

import io
import os
import struct
import tempfile

import numpy as np
import pytest
import soundfile
from small_corpora import encoded, noise

from reproduce.data.audio import AudioError, decode

SAMPLES = 16000
SOUND = noise(1.0, 5)


def put(data: bytes, place: int, value: int, form: str) -> bytes:
    """The file with one size replaced."""
    changed = bytearray(data)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


def file(form: str, sub: str = "PCM_16") -> bytes:
    return encoded(SOUND, form=form, sub=sub)


WAV, AIFF, SVX, AU, CAF, NIST = map(file, ("WAV", "AIFF", "SVX", "AU", "CAF", "NIST"))
RF64, W64 = file("RF64"), file("W64")
DATA = {
    "WAV": (WAV, 40, "<I", 0), "RF64": (RF64, 28, "<Q", 0), "AIFF": (AIFF, 42, ">I", 8),
    "W64": (W64, W64.index(b"data\xf3") + 16, "<Q", 24), "AU": (AU, 8, ">I", 0),
    "SVX": (SVX, SVX.index(b"BODY") + 4, ">I", 0), "CAF": (CAF, CAF.index(b"data") + 4, ">q", 4),
}  # fmt: skip
"""Container -> a whole file, where the size of its samples stands, how, and what it counts too."""
OUTER = {
    "WAV": (4, "<I"), "RF64": (20, "<Q"), "AIFF": (4, ">I"), "W64": (16, "<Q"), "SVX": (4, ">I")
}  # fmt: skip
"""Container -> where the size of the whole stands."""


def refused(data: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        decode(data)
    return str(caught.value)


def whole(data: bytes, expected: bytes) -> bool:
    return np.array_equal(decode(data)[0], decode(expected)[0])


@pytest.mark.parametrize("form", OUTER)
def test_the_size_of_the_whole_decides_nothing(form: str) -> None:
    """Too large, too small, left open, of the cut file: samples are whole or they aren't."""
    data = DATA[form][0]
    cut = data[: len(data) // 2]
    place, kind = OUTER[form]
    for size in (0, 8, 36, len(data), len(data) + 999, len(cut) - 8, len(cut), 0x7FFFFFFF):
        assert whole(put(data, place, size, kind), data), size
        assert refused(put(cut, place, size, kind)).startswith("truncated: "), size
    if kind == "<I":
        assert whole(put(data, place, 0xFFFFFFFF, kind), data)
        assert refused(put(cut, place, 0xFFFFFFFF, kind)).startswith("truncated: ")


@pytest.mark.parametrize("form", DATA)
def test_samples_declared_and_not_there_are_missed(form: str) -> None:
    data, place, kind, more = DATA[form]
    for frames in (SAMPLES + 1, SAMPLES + 2000, 2**29):
        reason = refused(put(data, place, 2 * frames + more, kind))
        assert reason.startswith("truncated: ") or (form == "CAF" and "malformed" in reason)


@pytest.mark.parametrize("form", DATA)
def test_samples_behind_those_declared_are_missed(form: str) -> None:
    """A header that was never finished, or was that of a shorter file."""
    data, place, kind, more = DATA[form]
    assert "declares no samples: data size 0, and " in refused(put(data, place, more, kind))
    less = refused(put(data, place, SAMPLES + more, kind))
    assert less.startswith("its header declares less than there is: 16000 bytes of samples, and ")


@pytest.mark.parametrize(
    ("form", "size"),
    [
        *(("WAV", 0xFFFFFFFF - less) for less in (0, 36, 44, 255)),
        *(("WAV", 0x7FFFFFFF - less) for less in (-1, 0, 36, 44, 0xFFF, 0xFF)),
        ("AIFF", 0x7F000008), ("AIFF", 0xFFFFFFFF), ("AU", 0xFFFFFFFF), ("SVX", 0xFFFFFFFF),
        ("RF64", 2**63), ("W64", 2**64 - 1),
    ],
)  # fmt: skip
def test_sizes_that_streams_leave_open_are_no_sizes(form: str, size: int) -> None:
    data, place, kind, _ = DATA[form]
    stream = put(data, place, size, kind)
    assert whole(stream, data)
    if form == "WAV":
        for outer in (0, 36, 0x7FFFFFFF, 0xFFFFFFFF):
            assert whole(put(stream, 4, outer, "<I"), data)
        assert "truncated" in refused(put(stream, 4, len(data) + 5000, "<I"))


def test_a_size_of_two_gigabytes_is_a_size() -> None:
    for size in (0x80001000, 0xC0000000, 0x7FFE0000):
        assert refused(put(WAV, 40, size, "<I")).startswith("truncated: ")


@pytest.mark.parametrize(
    ("form", "sub"),
    [("WAV", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("AU", "PCM_16"),
     ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16"), ("SVX", "PCM_16"),
     ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
     ("WAV", "IMA_ADPCM"), ("W64", "GSM610")],
)  # fmt: skip
def test_files_joined_byte_by_byte_are_not_half_read(form: str, sub: str) -> None:
    """Their first header stands for all: the second half would be lost, or read as noise."""
    data = file(form, sub)
    assert refused(data + data).startswith(
        ("its header declares less", "several sounds", "can't be decoded")
    )


@pytest.mark.parametrize("form", [*DATA, "NIST", "OGG", "MP3"])
def test_padding_and_tags_behind_the_samples_are_no_samples(form: str) -> None:
    data = file(form, {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(form, "PCM_16"))
    tag = b"TAG" + bytes(range(1, 126))
    ape = b"APETAGEX" + struct.pack("<IIII8x", 2000, 50, 0, 0) + b"x" * 50
    id3 = b"ID3\4\0\0\0\0\1\0" + b"x" * 128
    for more in (bytes(40_000), tag, id3 + bytes(9), ape + tag, b"\r\n"):
        assert whole(data + more, data), more[:8]


def test_chunks_behind_the_samples_may_be_cut() -> None:
    info = b"LIST" + struct.pack("<I", 4000) + b"INFO" + b"x" * 3996
    for kept in (8, 12, 300, 4008):
        assert whole(WAV + info[:kept], WAV)
    mark = b"ANNO" + struct.pack(">I", 4000) + b"x" * 4000
    assert whole(AIFF + mark, AIFF)
    assert whole(AIFF + mark[:2000], AIFF)


def test_two_chunks_of_samples_are_not_half_read() -> None:
    for data, first in ((WAV, 36), (AIFF, 38)):
        assert refused(data + data[first:]).startswith(("several chunks of", "can't be decoded"))


def test_the_second_count_of_samples_is_asked_too() -> None:
    """A header repaired for the cut file in one place only."""
    half = 24_000
    aiff = put(AIFF[: 54 + half], 42, half + 8, ">I")
    rf64 = put(RF64[: 104 + half], 28, half, "<Q")
    for data in (aiff, rf64):
        assert refused(data) == "truncated: 16000 samples declared, 12000 are there"
    assert len(decode(put(aiff, 22, 12000, ">I"))[0]) == 12000
    assert len(decode(put(rf64, 36, 0, "<Q"))[0]) == 12000
    adpcm = file("WAV", "MS_ADPCM")
    start = adpcm.index(b"data") + 8
    cut = put(adpcm[: start + 4096], start - 4, 4096, "<I")
    assert refused(cut) == f"truncated: 16000 samples declared, {8 * 1012} are there"


def test_byte_orders() -> None:
    for form, endian in (("WAV", "BIG"), ("AU", "LITTLE"), ("AIFF", "LITTLE"), ("CAF", "LITTLE")):
        memory = io.BytesIO()
        soundfile.write(memory, SOUND, 16000, format=form, subtype="PCM_16", endian=endian)
        data = memory.getvalue()
        assert whole(data, WAV)
        assert refused(data[:-2]).startswith(("truncated: ", "can't be decoded: "))


def test_sphere_counts_its_samples() -> None:
    for count, reason in (
        (8000, "declares less"),
        (0, "declares no samples"),
        (16001, "truncated"),
    ):
        line = b"sample_count -i %d\n" % count
        other = NIST.replace(b"sample_count -i 16000\n", line)
        other = other[:1024] + NIST[-32000:] if len(line) == 22 else other
        other = other.replace(b"end_head\n", b"end_head\n" + b"\n" * (33024 - len(other)), 1)
        assert len(other) == 33024
        assert reason in refused(other)


@pytest.mark.parametrize(
    ("form", "sub"),
    [("WAV", "MS_ADPCM"), ("WAV", "GSM610"), ("WAV", "G721_32"), ("WAV", "NMS_ADPCM_16"),
     ("WAV", "NMS_ADPCM_32"), ("W64", "GSM610"), ("AIFF", "GSM610"), ("CAF", "ALAC_16")],
)  # fmt: skip
def test_what_the_last_block_adds_is_left_out(form: str, sub: str) -> None:
    for frames in (15000, 16001, 16320):
        assert len(decode(encoded(noise(frames / 16000), form=form, sub=sub))[0]) == frames


def test_a_wrong_fact_is_not_believed() -> None:
    """It says 0, or counts all channels together, or is that of a block too many."""
    data = encoded(np.stack([SOUND, SOUND], 1), form="WAV", sub="MS_ADPCM")
    place = data.index(b"fact") + 8
    frames = soundfile.SoundFile(io.BytesIO(data)).frames
    assert len(decode(data)[0]) == SAMPLES
    for fact in (0, 2 * frames, 0xFFFFFFFF, 100):
        assert len(decode(put(data, place, fact, "<I"))[0]) == frames


def test_an_mp3_says_nothing_on_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(noise(20.0), form="MP3", sub="MPEG_LAYER_III")
    assert whole(data + b"TAG" + bytes(range(1, 126)), data)
    lost = data[:9000] + data[9700:] + bytes(700)
    assert refused(lost).startswith("truncated: ")
    wrong = refused(data[:9000] + bytes(700) + data[9700:])
    assert wrong.startswith(("damaged: part2_3_length", "truncated: "))
    assert capfd.readouterr() == ("", "")


def test_a_flac_that_counts_too_few_samples() -> None:
    data = file("FLAC")
    for count in (SAMPLES - 1, 24, 4096):
        assert refused(put(data, 22, count, ">I")).startswith("damaged: these aren't all the samp")
    unhashed = data[:26] + bytes(16) + data[42:]
    assert whole(unhashed, data)
    stereo = encoded(np.stack([SOUND, 0.5 * SOUND], 1))
    assert len(decode(stereo)[0]) == SAMPLES


def test_counts_that_a_decoder_goes_by_are_compared_with_what_is_there() -> None:
    gsm = file("AIFF", "GSM610")
    place = gsm.index(b"COMM") + 10
    assert "its sizes contradict each other: 1722 samples" in refused(put(gsm, place, 1722, ">I"))
    data = encoded(noise(20.0), form="MP3", sub="MPEG_LAYER_III")
    lame = data.index(b"LAME") if b"LAME" in data else data.index(b"Lavc")
    trimmed = bytearray(data)
    trimmed[lame + 21 : lame + 24] = b"\xff\xff\xff"  # 4095 samples off either end
    assert "truncated" in refused(bytes(trimmed)) or len(decode(bytes(trimmed))[0]) > 311_000
    for size in (2**62, 2**63 + 2**20, 2**64 - 2**20):
        for form in ("RF64", "W64"):
            whole_file, at, kind, _ = DATA[form]
            assert refused(put(whole_file, at, size, kind)).startswith(("truncated", "can't be de"))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")
def test_a_full_disk_for_temporary_files_costs_no_mp3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder's words are caught without one."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert len(decode(encoded(noise(0.5), form="MP3", sub="MPEG_LAYER_III"))[0]) == 8000
