"""Writing and reading a manifest: order, safety, continuing, refusing."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from reproduce.data import manifest as module
from reproduce.data import verified
from reproduce.data.audio import AudioError, Decoded, to_float
from reproduce.data.corpora import AudioSource, Item, Rejected, Utterance, read_corpus
from reproduce.data.manifest import Manifest, kept_without_corpus
from reproduce.data.packing import Journal
from reproduce.data.subsets import STUDY_SEED, nested_subsets
from reproduce.data.summary import Summary
from reproduce.errors import DataError
from reproduce.records import MANIFEST_COLUMNS, SUBSETS

write_manifest = partial(module.write_manifest, jobs=1)


@dataclass(frozen=True)
class Noise(AudioSource):
    seed: int
    seconds: float = 0.1
    fault: str = ""

    def load(self) -> Decoded:
        if self.fault:
            raise AudioError(self.fault)
        rng = np.random.default_rng(self.seed)
        samples = (0.1 * rng.standard_normal(round(16000 * self.seconds))).astype(np.float32)
        return Decoded(samples, 16000, hashlib.sha256(samples).hexdigest())


def utterance(number: int, split: str = "train", **fields: object) -> Utterance:
    values = {
        "id": f"u{number:03}",
        "split": split,
        "speaker": f"{split}{number % 3}",
        "text": f"TEXT {chr(65 + number % 5)}",
        "source": f"{split}/{number}.wav",
        "audio": Noise(number, 0.1 + 0.01 * (number % 7)),
    }
    return Utterance(**{**values, **fields})  # type: ignore[arg-type]


def corpus(train: int = 20, valid: int = 5) -> list[Item]:
    return [utterance(n) for n in range(train)] + [
        utterance(n, "valid") for n in range(train, train + valid)
    ]


def pcm(item: Utterance) -> np.ndarray:
    return np.rint(item.audio.load().samples * 32768).astype(np.int16)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_written_is_what_was_given(tmp_path: Path, jobs: int) -> None:
    items = corpus()
    folder = tmp_path / "data"
    summary = write_manifest(items, folder, corpus="noise", options={"a": 1}, jobs=jobs)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", ".verified.json", "audio.pcm", "manifest.arrow", "manifest.csv", "subset_10h.tsv",
        "subset_10min.tsv", "subset_1h.tsv", "subset_all.tsv", "summary.json",
    ]  # fmt: skip
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == MANIFEST_COLUMNS
    assert [row["id"] for row in rows] == [item.id for item in items]
    packed = np.fromfile(folder / "audio.pcm", dtype="<i2")
    assert np.array_equal(packed, np.concatenate([pcm(item) for item in items]))

    manifest = Manifest.read(folder)
    assert manifest.sha256 == hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest()
    assert manifest.summary == summary
    for item, row in zip(items, manifest.rows.to_pandas().itertuples(), strict=True):
        samples = manifest.audio.slice(row.offset, row.samples)
        assert np.array_equal(samples, pcm(item))
        assert row.seconds == row.samples / 16000
        assert row.sha256 == item.audio.load().sha256
        assert (row.text, row.speaker, row.source) == (item.text, item.speaker, item.source)
    assert to_float(samples).dtype == np.float32


def test_summary_counts(tmp_path: Path) -> None:
    summary = write_manifest(corpus(), tmp_path / "data", corpus="noise")
    stored = json.loads((tmp_path / "data" / "summary.json").read_text())
    assert stored["utterances"] == summary.utterances == {"train": 20, "valid": 5, "test": 0}
    assert stored["hours"]["train"] == pytest.approx(
        sum(0.1 + 0.01 * (n % 7) for n in range(20)) / 3600, abs=1e-6
    )
    assert summary.speakers["valid"] == ["valid0", "valid1", "valid2"]
    assert summary.lengths["train"] == {"shortest": 0.1, "median": 0.13, "longest": 0.16}
    assert summary.warnings == []
    assert summary.subsets["10min"]["utterances"] == 20


def test_select(tmp_path: Path) -> None:
    lengths = [0.05 * (1 + n % 5) for n in range(30)]
    items: list[Item] = [
        utterance(n, "train" if n % 3 else "valid", audio=Noise(n, s))
        for n, s in enumerate(lengths)
    ]
    write_manifest(items, tmp_path / "data", corpus="noise")
    manifest = Manifest.read(tmp_path / "data")
    train = manifest.select(split="train")
    assert list(train.strings("id")) == [f"u{n:03}" for n in range(30) if n % 3]
    assert len(manifest.select(split="valid", subset="10min")) == 10
    strict = manifest.select(split="valid", min_seconds=0.1, max_seconds=0.2)
    assert set(strict.array("seconds")) == {0.15, 0.2}
    with pytest.raises(ValueError):
        manifest.select(split="dev")
    with pytest.raises(ValueError):
        manifest.select(split="train", subset="2h")


def test_subsets_hold_the_smaller_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of hours would need hours: here they are parts of a second."""
    limits = (0.5, 1.0, 2.0)
    monkeypatch.setattr(module, "nested_subsets", partial(nested_subsets, limits=limits))
    write_manifest(corpus(), tmp_path / "data", corpus="noise")
    manifest = Manifest.read(tmp_path / "data")
    seconds = manifest.select(split="train").array("seconds")
    labels = nested_subsets(seconds, limits=limits)
    assert set(labels) == set(SUBSETS)
    for count, subset in enumerate(SUBSETS, start=1):
        expected = [f"u{n:03}" for n, label in enumerate(labels) if label in SUBSETS[:count]]
        assert list(manifest.select(split="train", subset=subset).strings("id")) == expected


def test_bad_items_are_rejected_with_reasons_and_nothing_else(tmp_path: Path) -> None:
    bad = [
        utterance(50, audio=Noise(0, fault="truncated: 1 of 2 samples")),
        utterance(51, text="  \t "),
        utterance(52, text="BELL \a"),
        utterance(53, split="dev"),
        utterance(54, id=""),
        utterance(3, source="again.wav"),
        Rejected("x.wav", None, "no transcript"),
        Rejected("caf\udce9.wav", None, "no transcript"),
        utterance(55, text="\ud800"),
    ]
    summary = write_manifest([*bad[:4], *corpus(), *bad[4:]], tmp_path / "data", corpus="noise")
    assert [(r["source"], r["id"], r["reason"]) for r in summary.rejected] == [
        ("train/50.wav", "u050", "truncated: 1 of 2 samples"),
        ("train/51.wav", "u051", "no transcript"),
        ("train/52.wav", "u052", "transcript holds a control character: U+0007"),
        ("dev/53.wav", "u053", "unknown split: 'dev'"),
        ("train/54.wav", None, "no id"),
        ("again.wav", "u003", "duplicate id"),
        ("x.wav", None, "no transcript"),
        ("caf\\udce9.wav", None, "no transcript"),
        ("train/55.wav", "u055", "transcript holds a control character: U+D800"),
    ]
    assert summary.reasons()["no transcript"] == 3
    assert [r["split"] for r in summary.rejected] == [*["train"] * 3, "dev", *["train"] * 2, "", "",
                                                      "train"]  # fmt: skip
    assert summary.warnings == [
        "5 training utterances rejected: subsets are drawn from the rest, so they aren't those of "
        "the whole corpus",
        "1 duplicate id, only the first utterance of each is kept: u003",
    ]
    manifest = Manifest.read(tmp_path / "data")
    assert list(manifest.rows.strings("id")) == [item.id for item in corpus()]
    assert manifest.rows.strings("text")[3] == "TEXT D"


def test_difficult_text_survives(tmp_path: Path) -> None:
    texts = [
        "NA",
        "null",
        "cafe\u0301",
        'a "b", c',
        "a\u2028b\nc",
        "مرحبا",
        "한국어",
        "=1+1",
        "007",
    ]
    items: list[Item] = [utterance(n, text=t, speaker="NaN") for n, t in enumerate(texts)]
    write_manifest(items, tmp_path / "data", corpus="noise")
    rows = Manifest.read(tmp_path / "data").rows.to_pandas()
    expected = texts.copy()
    expected[2], expected[4] = "caf\u00e9", "a b c"
    assert rows["text"].tolist() == expected
    assert set(rows["speaker"]) == {"NaN"}


def test_warnings_name_speakers_and_unseen_characters(tmp_path: Path) -> None:
    items: list[Item] = [
        utterance(0, "valid", text="A ÉTÉ", speaker="s"),
        utterance(1, "train", text="TEA", speaker="s"),
        utterance(2, "valid", text="Ö", speaker=""),
        utterance(3, "train", text="TÖT", speaker=""),
    ]
    summary = write_manifest(items, tmp_path / "data", corpus="noise")
    assert summary.warnings[0].startswith("1 speaker shared by train and valid")
    assert summary.warnings[0].endswith(": s")
    assert summary.warnings[1:] == [
        "the character 'É' (U+00C9) of valid transcripts is never seen in training: u000"
    ]


def test_without_training_no_character_is_called_unseen(tmp_path: Path) -> None:
    """Each of them would be: the one thing that is wrong is said once."""
    summary = write_manifest([utterance(0, "valid", text="TEA")], tmp_path / "d", corpus="noise")
    assert summary.warnings == ["there is no train utterance"]


def test_a_second_prepare_does_nothing_and_a_changed_one_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = write_manifest(corpus(), folder, corpus="noise")
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}
    assert write_manifest(iter(corpus()), folder, corpus="noise") == first
    assert times == {p: p.stat().st_mtime_ns for p in times}
    other = write_manifest(corpus(), folder, corpus="noise", subset_seed=1)
    assert other.subset_seed == 1
    larger = write_manifest(corpus(30), folder, corpus="noise")
    assert larger.utterances["train"] == 30
    assert Manifest.read(folder).summary == larger


def test_files_are_read_through_once_and_only_where_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = tmp_path / "data", []
    write_manifest(corpus(), folder, corpus="noise", shard_samples=7000)
    real = verified.read_through
    monkeypatch.setattr(
        verified, "read_through", lambda f, files: (read.extend(files), real(f, files))[1]
    )
    Manifest.read(folder)
    assert write_manifest(corpus(), folder, corpus="noise").outcome == "there already"
    assert not read, "prepare has noted that all is whole"
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    Manifest.read(tmp_path / "copy")
    assert len(read) == 2 + 4 + len(list(folder.glob("audio-*.pcm")))
    assert write_manifest(corpus(), tmp_path / "copy", corpus="noise").outcome == "there already"
    del read[:]
    shard = tmp_path / "copy" / "audio-0002.pcm"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    status = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(DataError, match=r"audio-0002\.pcm: changed since it was prepared"):
            Manifest.read(tmp_path / "copy")
    assert read == ["audio-0002.pcm"]
    assert write_manifest(corpus(), tmp_path / "copy", corpus="noise").outcome == "made anew"
    Manifest.read(tmp_path / "copy")


def test_audio_in_shards_is_the_same_audio(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "data"
    one = write_manifest(corpus(), whole, corpus="noise")
    assert [shard["file"] for shard in one.audio] == ["audio.pcm"]
    write_manifest(corpus(), folder, corpus="noise", shard_samples=3000)
    (folder / "summary.json").unlink()
    for shard_samples in (7000, one.samples - 1, one.samples // 2, one.samples):
        summary = write_manifest(corpus(), folder, corpus="noise", shard_samples=shard_samples)
        shards = sorted(folder.glob("audio*.pcm"))
        assert [shard["file"] for shard in summary.audio] == [path.name for path in shards]
        lengths = [path.stat().st_size // 2 for path in shards]
        assert [shard["samples"] for shard in summary.audio] == lengths
        assert set(lengths[:-1]) <= {shard_samples}
        assert sum(lengths) == one.samples
        assert 0 < lengths[-1] <= shard_samples
        for shard, path in zip(summary.audio, shards, strict=True):
            assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert b"".join(path.read_bytes() for path in shards) == (whole / "audio.pcm").read_bytes()
        for name in ("manifest.csv", "manifest.arrow"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        manifest = Manifest.read(folder)
        for n, item in enumerate(corpus()):
            place = (manifest.rows.at(name, n) for name in ("offset", "samples"))
            assert np.array_equal(manifest.audio.slice(*place), pcm(item))
        (folder / "summary.json").unlink()
    assert summary == one


def as_an_earlier_version_wrote_it(folder: Path) -> None:
    """One audio.pcm, no columns, nothing remembered."""
    stored = json.loads((folder / "summary.json").read_text())
    (audio,) = stored.pop("audio")
    del stored["columns_sha256"]
    stored["audio_sha256"] = audio["sha256"]
    (folder / "summary.json").write_text(json.dumps(stored))
    (folder / "manifest.arrow").unlink()
    (folder / ".verified.json").unlink()


def test_what_an_earlier_version_prepared_is_read_and_prepare_adds_the_columns(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    whole = write_manifest(corpus(), folder, corpus="noise")
    frame = Manifest.read(folder).rows.to_pandas()
    columns = (folder / "manifest.arrow").read_bytes()
    as_an_earlier_version_wrote_it(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}
    old = Manifest.read(folder)
    assert old.sha256 == whole.manifest_sha256, "runs made from it go on"
    assert old.rows.to_pandas().equals(frame)
    assert np.array_equal(old.audio.slice(0, 1600), pcm(utterance(0))[:1600])
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}

    assert write_manifest(corpus(), folder, corpus="noise").outcome == "there already"
    assert Summary.read(folder / "summary.json") == whole
    assert (folder / "manifest.arrow").read_bytes() == columns
    assert not (folder / ".partial").exists()
    as_an_earlier_version_wrote_it(folder)
    kept = kept_without_corpus(folder, {}, STUDY_SEED)  # its corpus is gone
    assert kept == whole
    assert (folder / "manifest.arrow").read_bytes() == columns

    as_an_earlier_version_wrote_it(folder)
    data = bytearray((folder / "audio.pcm").read_bytes())
    data[-1] ^= 1
    (folder / "audio.pcm").write_bytes(data)
    with pytest.raises(DataError, match=r"audio\.pcm: changed since it was prepared"):
        Manifest.read(folder)
    assert kept_without_corpus(folder, {}, STUDY_SEED) is None


def test_what_is_in_use_is_not_exchanged(tmp_path: Path) -> None:
    """A rerun with other data under a running training."""
    folder = tmp_path / "data"
    write_manifest(corpus(), folder, corpus="noise")
    training = Manifest.read(folder)
    write_manifest(corpus()[::-1], folder, corpus="noise")
    for item, row in zip(corpus(), training.rows.to_pandas().itertuples(), strict=True):
        assert np.array_equal(training.audio.slice(row.offset, row.samples), pcm(item))


def test_details_of_reasons_are_not_counted_apart(tmp_path: Path) -> None:
    faults = [f"NaN or infinite samples: {n}, the first at 0.{n} s" for n in range(1, 7)]
    items = [utterance(n, audio=Noise(n, fault=fault)) for n, fault in enumerate(faults)]
    items += [utterance(n, text=f"BELL {chr(n)}") for n in (7, 8)]
    summary = write_manifest([*corpus(3), *items], tmp_path / "data", corpus="noise")
    assert summary.reasons() == {
        "NaN or infinite samples": 6, "transcript holds a control character": 2,
    }  # fmt: skip


def test_a_changed_source_file_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    for name in "abc":
        soundfile.write(root / f"{name}.wav", Noise(ord(name)).load().samples, 16000)
    (root / "t.csv").write_text("path,text\na.wav,A\nb.wav,B\nc.wav,C\n")
    source = read_corpus("folder", root=root)
    first = write_manifest(source, tmp_path / "data", corpus="folder", options=source.options)
    soundfile.write(root / "b.wav", Noise(9).load().samples, 16000)
    os.utime(root / "b.wav", ns=(1, 1))
    second = write_manifest(source, tmp_path / "data", corpus="folder", options=source.options)
    assert second.manifest_sha256 != first.manifest_sha256
    expected = hashlib.sha256((root / "b.wav").read_bytes()).hexdigest()
    rows = Manifest.read(tmp_path / "data").rows.to_pandas()
    assert rows.set_index("id")["sha256"]["b"] == expected


class Interrupted(list[Item]):
    """A corpus whose second reading (the first is the listing) is cut off at item `at`."""

    at = 10

    def __iter__(self) -> Iterator[Item]:
        self.readings = getattr(self, "readings", 0) + 1
        for number, item in enumerate(super().__iter__()):
            if self.readings == 2 and number == self.at:
                raise KeyboardInterrupt
            yield item


@dataclass(frozen=True)
class Counted(Noise):
    log: str = ""

    def load(self) -> Decoded:
        with open(self.log, "a") as file:
            file.write(f"{self.seed}\n")
        return super().load()


@pytest.mark.parametrize("shard_samples", [1600, 4000, 2**31])
@pytest.mark.parametrize("whole_line", [False, True])
def test_interrupted_and_called_again_it_goes_on_where_it_was(
    tmp_path: Path, whole_line: bool, shard_samples: int
) -> None:
    log = tmp_path / "log"
    items = [utterance(n, audio=Counted(n, 0.1, log=str(log))) for n in range(20)]
    items[4] = utterance(4, audio=Noise(4, fault="silent"))
    folder = tmp_path / "data"
    write = partial(write_manifest, shard_samples=shard_samples)
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(items), folder, corpus="noise")
    assert not (folder / "summary.json").exists()
    with pytest.raises(DataError, match="nothing is prepared here"):
        Manifest.read(folder)
    # A write cut in the middle: half a line or one that lacks but its end, and audio that no line
    # speaks of.
    with open(folder / ".partial" / "data" / "journal.jsonl", "r+b") as file:
        if whole_line:
            file.truncate(file.seek(-1, os.SEEK_END))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b'{"id": "u0')
    last = sorted((folder / ".partial" / "data").glob("audio-*.pcm"))[-1]
    with open(last, "ab") as file:
        file.write(b"\0" * 77)
    summary = write(items, folder, corpus="noise")
    whole = write(items, tmp_path / "whole", corpus="noise")
    assert summary == whole
    audio = [shard["file"] for shard in whole.audio]
    for name in ("manifest.csv", "manifest.arrow", "summary.json", *audio):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = ["9"] if whole_line else []
    decoded = [str(n) for n in range(20) if n != 4]
    assert log.read_text().split()[: 19 + len(again)] == [*decoded[:9], *again, *decoded[9:]]
    assert not (folder / ".partial").exists()


def test_what_another_listing_left_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        write_manifest(Interrupted(corpus()), folder, corpus="noise")
    items = [utterance(n, text="OTHER") for n in range(3)]
    write_manifest(items, folder, corpus="noise")
    manifest = Manifest.read(folder)
    assert list(manifest.rows.strings("text")) == ["OTHER"] * 3
    assert len(manifest.audio) == manifest.rows.array("samples").sum()


def test_no_good_utterance_is_one_error_with_reasons(tmp_path: Path) -> None:
    items: list[Item] = [utterance(n, audio=Noise(n, fault="silent")) for n in range(8)]
    with pytest.raises(DataError, match=r"no good utterance:\n  train/0\.wav: silent") as caught:
        write_manifest(items, tmp_path / "data", corpus="noise")
    assert "and 3 more" in str(caught.value)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="no utterance found"):
        write_manifest([], tmp_path / "empty", corpus="noise")


def test_a_full_disk_is_one_error_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Journal.add

    def full(self: Journal, item: Item, result: object) -> None:
        if self.done == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, item, result)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", full)
        with pytest.raises(DataError, match="No space left on device\n  make room"):
            write_manifest(corpus(), tmp_path / "data", corpus="noise")
    assert write_manifest(corpus(), tmp_path / "data", corpus="noise").utterances["train"] == 20


def test_reading_refuses_what_was_changed(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "data"
    with pytest.raises(DataError, match="run `w2vrep prepare RECIPE --work"):
        Manifest.read(folder)
    write_manifest(corpus(), folder, corpus="noise")
    audio, manifest = folder / "audio.pcm", folder / "manifest.csv"
    whole, text = audio.read_bytes(), manifest.read_text()
    audio.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="bytes, the manifest needs"):
        Manifest.read(folder)
    short = Manifest.read(folder, verify=False)
    last = len(short.rows) - 1
    with pytest.raises(DataError, match="prepare it again"):
        short.audio.slice(*(short.rows.at(name, last) for name in ("offset", "samples")))
    audio.write_bytes(whole)
    manifest.write_text(text.replace("TEXT A", "TEXT B", 1))
    with pytest.raises(DataError, match="changed since it was prepared"):
        Manifest.read(folder)
    columns = folder / "manifest.arrow"
    stored = columns.read_bytes()
    for harm in (stored[:-50], stored[:-9], stored[:8], b"", b"id,corpus\n1,2\n"):
        columns.write_bytes(harm)
        with pytest.raises(DataError, match=r"manifest\.arrow: can't be read"):
            Manifest.read(folder, verify=False)
    (folder / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="not a summary"):
        Manifest.read(folder)
    assert write_manifest(corpus(), folder, corpus="noise").warnings == []
    assert manifest.read_text() == text
