"""Nothing that files hold leads to anything but rows, reasons and clear errors.

The examples are the same in every run, so that a failure is one of the change at hand. To look for
new ones, give a number of examples a test, and they differ from run to run::

    W2VREP_FUZZ=5000 pytest tests/data/test_data_fuzz.py
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpora import encoded, noise

from reproduce.data.audio import SAMPLE_RATE, AudioError, Decoded, decode, duration, pack
from reproduce.data.corpora import Rejected, Utterance, read_corpus
from reproduce.data.corpora.files import BytesAudio
from reproduce.data.manifest import Manifest, write_manifest
from reproduce.data.packing import listing_sha256
from reproduce.errors import DataError

NEW_EXAMPLES = int(os.environ.get("W2VREP_FUZZ", "0"))
settings.register_profile("same", deadline=None, database=None, derandomize=True, max_examples=40)
settings.register_profile(
    "new", deadline=None, database=None, max_examples=NEW_EXAMPLES or 1,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("new" if NEW_EXAMPLES else "same")

# What is raised where nobody can catch it is written to stderr: a traceback all the same.
pytestmark = pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning", "error::RuntimeWarning"
)

SOUND = noise(0.05)
FORMATS = [
    ("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("WAVEX", "FLOAT"), ("WAV", "GSM610"),
    ("WAV", "NMS_ADPCM_16"), ("WAV", "MS_ADPCM"), ("WAV", "IMA_ADPCM"), ("OGG", "VORBIS"),
    ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_24"), ("AIFF", "GSM610"),
    ("AU", "PCM_16"), ("AU", "G721_32"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16"),
    ("NIST", "ULAW"), ("W64", "PCM_32"), ("W64", "GSM610"), ("RF64", "PCM_16"), ("HTK", "PCM_16"),
    ("SVX", "PCM_16"), ("VOC", "PCM_16"), ("IRCAM", "PCM_16"), ("MAT5", "PCM_16"),
]  # fmt: skip
FILES = [encoded(SOUND, form=form, sub=sub) for form, sub in FORMATS]


@settings(max_examples=NEW_EXAMPLES or 400)
@given(
    file=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.none(), st.integers(0, 2000)),
    more=st.binary(max_size=20),
)
def test_audio_headers(
    file: bytes, changes: list[tuple[int, int]], kept: int | None, more: bytes
) -> None:
    data = bytearray(file[:kept] + more)
    for place, value in changes:
        if place < len(data):
            data[place] = value
    with suppress(AudioError):
        assert duration(bytes(data)) >= 0
    with suppress(AudioError):
        samples, rate = decode(bytes(data))
        if max(rate, SAMPLE_RATE) // math.gcd(rate, SAMPLE_RATE) < 1000:  # others take a second
            packed = pack(Decoded(samples, rate, ""))
            assert len(packed.samples) == math.ceil(len(samples) * SAMPLE_RATE / rate)


ANY = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
FIELD = st.one_of(
    ANY, st.sampled_from(["", "a", "a.wav", "NA", "é", "e\u0301", '"', "x,y", "\ud800"])
)


@given(rows=st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=8))
def test_ids_speakers_and_transcripts(rows: list[tuple[str, str, str]]) -> None:
    """What gets into a manifest comes out of it, in NFC and with single spaces."""
    audio = BytesAudio(FILES[0])
    first = Utterance("", "train", "", "TEXT", "first", audio)
    items = [Utterance("\0first", "train", "", "TEXT", "f", audio), first]
    items += [Utterance(i, "train", s, t, f"{n}", audio) for n, (i, s, t) in enumerate(rows)]
    items += [Utterance("the last one, good", "valid", "", "TEXT", "last", audio)]
    with tempfile.TemporaryDirectory() as name:
        summary = write_manifest(items, Path(name), corpus="fuzz", jobs=1)
        read = Manifest.read(Path(name)).rows.to_pandas()
        assert summary.outcome == "made"
        assert write_manifest(items, Path(name), corpus="fuzz", jobs=1).outcome == "there already"
    assert len(read) + len(summary.rejected) == len(items)
    given_rows = {(i, s, " ".join(unicodedata.normalize("NFC", t).split())) for i, s, t in rows}
    given_rows.add(("the last one, good", "", "TEXT"))
    assert set(zip(read["id"], read["speaker"], read["text"], strict=True)) <= given_rows


LINES = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.builds(lambda a, b: f"{a}\t{b}".encode("utf-8", "surrogatepass"), FIELD, FIELD),
        st.builds(lambda a, b: f"{a},{b}".encode("utf-8", "surrogatepass"), FIELD, FIELD),
        st.builds(lambda a, b: json.dumps({"path": a, "text": b}).encode(), FIELD, FIELD),
        st.sampled_from([b'{"path": "a.wav", "text": "\\ud800"}', b'{"path": "\\ud800"}', b"[[[["]),
    ),
    max_size=8,
)  # fmt: skip


@given(
    lines=LINES,
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    header=st.sampled_from([b"path\ttext", b"path,text", b"audio,sentence,speaker", b"text"]),
)
def test_tables(lines: list[bytes], suffix: str, header: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "a.wav").write_bytes(FILES[1])
        (root / f"table{suffix}").write_bytes(b"\n".join([header, *lines]))
        corpus = read_corpus("folder", root=root)
        with suppress(DataError):
            items = list(corpus)
            assert listing_sha256(corpus)[1] == len(items)
            assert any(i.source == "a.wav" for i in items), "no file is passed over in silence"


@given(lines=LINES, ids=st.lists(st.sampled_from(["1-1-0", "1-1-1", "x"]), unique=True))
def test_transcripts_of_librispeech(lines: list[bytes], ids: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "part" / "1" / "1"
        folder.mkdir(parents=True)
        for id_ in ids:
            (folder / f"{id_}.flac").write_bytes(FILES[0])
        (folder / "1-1.trans.txt").write_bytes(b"\n".join([b"1-1-0 GOOD", *lines]))
        corpus = read_corpus("librispeech", root=name, train_parts=["part"], valid_parts=[])
        items = list(corpus)
        assert listing_sha256(corpus)[1] == len(items)
        named = [item.id for item in items if not isinstance(item, Rejected)]
        rejected = [item.id for item in items if isinstance(item, Rejected)]
        assert set(ids) <= {*named, *rejected}
        assert len(named) == len(set(named))
