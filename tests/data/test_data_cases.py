"""What can be wrong with a corpus, case by case.

Each ends in a good row, in a rejected row with its reason, or in one clear error; the good
utterances around it are never lost.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import at_most
from small_corpora import encoded, noise

from reproduce.data.corpora.files import FileAudio
from reproduce.data.manifest import Manifest
from reproduce.errors import DataError
from reproduce.recipe import load_recipe
from reproduce.records import WorkFolder
from reproduce.stages import prepare as stage

GOOD = encoded(noise(0.1, 1), form="WAV")
SPEECH = noise(0.2, 2)


@dataclass
class Case:
    """A third row in a table of three, or something done to the corpus; and what comes of it.

    Args:
        data: bytes of the file ``x.wav``.
        do: done in the corpus folder before it is read.
        path, text, id: of the row.
        good: the row's text in the manifest.
        samples: how many it has there.
        reason: why it is rejected, the beginning.
        error: what the error says.
        around: context of preparing it.
        after: done to ``data/`` before it is read.
    """

    data: bytes | None = GOOD
    do: Callable[[Path], object] = lambda root: None
    path: str = "x.wav"
    text: str = "TEXT"
    id: str = "x"
    good: str | None = None
    samples: int | None = None
    reason: str = ""
    error: str = ""
    around: Callable[[], object] | None = None
    after: Callable[[Path], object] | None = None


def shaped(
    rate: int, channels: int = 1, form: str = "WAV", sub: str = "PCM_16", block: int = 1
) -> Case:
    """A good file of 0.2 s in some format, which may fill its last block of samples."""
    samples = noise(0.2, 3, rate)
    if channels > 1:
        samples = np.stack([samples] * channels, axis=1)
    data = encoded(samples, rate, form, sub)
    frames = -(-len(samples) // block) * block
    return Case(data, good="TEXT", samples=-(-frames * 16000 // rate))


def broken(samples: np.ndarray, reason: str) -> Case:
    return Case(encoded(samples, form="WAV", sub="FLOAT"), reason=reason)


def with_value(value: float) -> np.ndarray:
    samples = SPEECH.copy()
    samples[1600] = value
    return samples


def cut(form: str, sub: str = "PCM_16", kept: float = 0.5) -> Case:
    data = encoded(noise(1.0), form=form, sub=sub)
    reason = "can't be decoded" if form == "FLAC" else "truncated"
    return Case(data[: int(len(data) * kept)], reason=reason)


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        (root / "x.wav").unlink()
        make(root / "x.wav")

    return do


def link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside.wav"
    outside.write_bytes(GOOD)
    path.symlink_to(outside)


def nfd_name(root: Path) -> None:
    os.replace(root / "x.wav", root / unicodedata.normalize("NFD", "é.wav"))


@contextmanager
def refused() -> Iterator[None]:
    """The system refuses to read x.wav, also to root."""
    load = FileAudio.load

    def refuse(self: FileAudio) -> object:
        if self.path.name == "x.wav":
            raise PermissionError(13, "Permission denied", str(self.path))
        return load(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileAudio, "load", refuse)
        yield


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda data: (data / name).write_text((data / name).read_text().replace(old, new, 1))


def flip(data: Path) -> None:
    """One bit of the audio."""
    with open(data / "audio.pcm", "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


OUTSIDE = "path leaves the corpus folder"
FLAC = encoded(SPEECH)
UNKNOWN_LENGTH = FLAC[:21] + bytes([FLAC[21] & 0xF0]) + bytes(4) + FLAC[26:]
HUGE_HEADER = FLAC[:21] + bytes([FLAC[21] | 0x0F]) + b"\xff" * 4 + FLAC[26:]

CASES = {
    # damaged audio
    "Ogg cut short": cut("OGG", "VORBIS"),
    "MP3 cut short": cut("MP3", "MPEG_LAYER_III"),
    "GSM cut short": cut("WAV", "GSM610"),
    **{f"{form} cut short": cut(form, kept=0.95) for form in (
        "FLAC", "WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF",
    )},
    "a container whose end can't be checked": Case(
        encoded(SPEECH, form="PVF"), reason="container not taken: whether a file of PVF"
    ),
    "empty file": Case(b"", reason="empty file"),
    "no samples": Case(encoded(SPEECH[:0], form="WAV"), reason="no samples"),
    "not audio": Case(b"this is a letter" * 99, reason="can't be decoded"),
    "a file of 8 GiB": Case(do=lambda root: os.truncate(root / "x.wav", 2**33), reason="too large"),
    "a header of 2^36 samples": Case(HUGE_HEADER, reason="too large"),
    "a header of unknown length": Case(UNKNOWN_LENGTH, reason="its header doesn't say how long"),
    # samples
    "NaN": broken(with_value(np.nan), "NaN or infinite samples: 1, the first at 0.100 s"),
    "infinite": broken(with_value(-np.inf), "NaN or infinite samples: 1"),
    "silent": broken(0 * SPEECH, "silent"),
    "constant": broken(0 * SPEECH + 0.3, "silent"),
    "silent in 16 bit": Case(encoded(0 * SPEECH), reason="silent"),
    "DC offset": Case(encoded(SPEECH + 0.3), good="TEXT", samples=3200),
    "beyond full scale": Case(encoded(SPEECH * 30, form="WAV", sub="FLOAT"), good="TEXT"),
    "the largest float": Case(encoded(with_value(3e38), form="WAV", sub="FLOAT"), good="TEXT"),
    "constant at another rate": Case(encoded(0 * SPEECH + 0.3, 44100), reason="silent"),
    # rates, channels, formats
    **{f"{rate} Hz": shaped(rate) for rate in (8000, 11025, 22050, 44100, 48000, 96000, 192000)},
    "1 kHz": Case(encoded(SPEECH, 1000, "WAV"), reason="sample rate out of range: 1000 Hz"),
    **{f"{count} channels": shaped(48000, count) for count in (2, 3, 6, 8)},
    **{f"{form} {sub}": shaped(16000, 1, form, sub) for form, sub in (
        ("FLAC", "PCM_S8"), ("FLAC", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"),
        ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAV", "ULAW"),
        ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"), ("NIST", "PCM_16"), ("CAF", "ALAC_16"), ("RF64", "PCM_16"),
    )},
    **{f"{form} {sub}, not seekable": shaped(16000, 1, form, sub, block) for form, sub, block in (
        ("WAV", "GSM610", 320), ("WAV", "G721_32", 1), ("WAV", "NMS_ADPCM_16", 1),
        ("AU", "G723_24", 120), ("AU", "G723_40", 120), ("AIFF", "GSM610", 160),
    )},
    "wrong extension": Case(FLAC, good="TEXT", samples=3200),
    # files and paths
    "unreadable": Case(around=refused, reason="can't be read: Permission denied"),
    "a folder": Case(do=replaced_by(lambda path: path.mkdir()), reason="not a file"),
    "a pipe": Case(do=replaced_by(os.mkfifo), reason="not a file"),
    "missing": Case(do=replaced_by(lambda path: None), reason="no such audio file"),
    "link inside": Case(do=replaced_by(lambda path: path.symlink_to("a.wav")), good="TEXT"),
    "link outside": Case(do=replaced_by(link_outside), reason=OUTSIDE),
    "link to nothing": Case(do=replaced_by(lambda p: p.symlink_to("z")), reason="no such audio"),
    "link to itself": Case(do=replaced_by(lambda p: p.symlink_to("x.wav")), reason="not a usable"),
    "path outside": Case(path="../corpus2/x.wav", reason=OUTSIDE),
    "absolute path": Case(path="/etc/passwd", reason=OUTSIDE),
    "path with ..": Case(path="sub/../x.wav", good="TEXT"),
    "path of another normal form": Case(do=nfd_name, path="é.wav", good="TEXT"),
    # ids and transcripts
    "duplicate id": Case(id="a", reason="duplicate id"),
    "no transcript": Case(text=" ", reason="no transcript"),
    "not in the table": Case(path="", reason="no audio file named"),
    "decomposed text": Case(text="cafe\u0301", good="café"),
    "Cyrillic": Case(text="здравствуй", good="здравствуй"),
    "Arabic": Case(text="مَرْحَبًا", good="مَرْحَبًا"),
    "Hangul in NFD": Case(text=unicodedata.normalize("NFD", "한국"), good="한국"),
    "beyond the BMP": Case(text="𐐀𐐁", good="𐐀𐐁"),
    "spaces of all kinds": Case(text="A\u00a0\u3000 B", good="A B"),
    "what looks like a number or nothing": Case(text="NA", good="NA"),
    "nothing but characters of no width": Case(text="\u200b \u200d\ufeff", reason="no transcript"),
    "joiners within a word": Case(text="ශ්\u200dරී", good="ශ්\u200dරී"),
    "a control character": Case(
        text="BELL \a", reason="transcript holds a control character: U+0007"
    ),
    # the table, the disk, the manifest
    "table not UTF-8": Case(
        do=lambda root: (root / "table.tsv").write_bytes(b"path\ttext\na.wav\t\xff\n"),
        error="no good utterance:\n  table.tsv: row 1: not UTF-8",
    ),
    "no good utterance": Case(
        do=lambda root: [(root / f"{name}.wav").write_bytes(b"") for name in "abx"],
        error="no good utterance:\n  a.wav: empty file",
    ),
    "full disk": Case(
        around=partial(at_most, 5000), error="can't be written: File too large\n  make room"
    ),
    "manifest edited": Case(after=edit("manifest.csv", "TEXT", "TEST"), error="changed since it"),
    "manifest deleted": Case(after=lambda data: (data / "manifest.csv").unlink(), error="missing"),
    "a list edited": Case(after=edit("subset_1h.tsv", "TEXT", "TEST"), error="changed since it"),
    "a list deleted": Case(after=lambda data: (data / "subset_1h.tsv").unlink(), error="missing"),
    "audio edited": Case(after=flip, error="audio.pcm: changed since it was prepared"),
    "audio cut": Case(after=lambda data: os.truncate(data / "audio.pcm", 9), error="9 bytes, the"),
    "summary cut": Case(
        after=lambda data: os.truncate(data / "summary.json", 9), error="not a summary"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure takes more time than all the rest."""
    monkeypatch.setattr(stage, "draw_corpus", lambda folder: folder)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_case_ends_in_a_row_a_reason_or_an_error(case: Case, tmp_path: Path) -> None:
    root, work = tmp_path / "corpus", WorkFolder(tmp_path / "work")
    (root / "sub").mkdir(parents=True)
    for name in "ab":
        (root / f"{name}.wav").write_bytes(GOOD)
    if case.data is not None:
        (root / "x.wav").write_bytes(case.data)
    rows = [("a", "a.wav", "TEXT A"), (case.id, case.path, case.text), ("b", "b.wav", "TEXT B")]
    lines = ["id\tpath\ttext\tsplit", *("\t".join((*row, "train")) for row in rows)]
    (root / "table.tsv").write_text("\n".join(lines), encoding="utf-8")
    case.do(root)
    sets = ["corpus=folder", f"root={root}", "transcripts=table.tsv", "jobs=1"]
    recipe = load_recipe("as-run", [f"data.{item}" for item in sets])

    def prepare_and_read() -> Manifest:
        with case.around() if case.around else open(os.devnull):  # type: ignore[attr-defined]
            stage.prepare(recipe, work)
        if case.after:
            case.after(work.data)
        return Manifest.read(work.data)

    if case.error:
        with pytest.raises(DataError) as caught:
            prepare_and_read()
        assert case.error in str(caught.value)
        return
    manifest = prepare_and_read()
    found = {row.id: row for row in manifest.rows.to_pandas().itertuples()}
    assert (found["a"].text, found["b"].text) == ("TEXT A", "TEXT B")
    for row in found.values():
        assert len(manifest.audio.slice(row.offset, row.samples)) == row.samples > 0
    rejected = [(item["id"], item["reason"]) for item in manifest.summary.rejected]
    if case.good is not None:
        assert found["x"].text == case.good
        assert case.samples is None or found["x"].samples == case.samples
        assert not rejected
    else:
        assert len(found) == 2
        assert rejected[0][0] == case.id
        assert rejected[0][1].startswith(case.reason)
        assert len(rejected) == 1 or rejected[1] == (None, "no transcript in table.tsv")
        assert manifest.summary.rejected[0]["split"] == "train"
        assert manifest.summary.warnings[0].startswith("1 training utterance rejected: subsets ")
