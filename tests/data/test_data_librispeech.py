"""The LibriSpeech layout, whole and damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from reproduce.data.corpora import Rejected, Utterance, read_corpus
from reproduce.data.manifest import write_manifest
from reproduce.errors import DataError, RecipeError


def chapter(root: Path, part: str, speaker: int, texts: dict[int, str], suffix: str = ".flac"):
    folder = root / part / str(speaker) / f"{speaker}0"
    folder.mkdir(parents=True, exist_ok=True)
    for number in texts:
        samples = np.random.default_rng(number).standard_normal(1600) * 0.1
        form = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
        soundfile.write(
            folder / f"{speaker}-{speaker}0-{number:04}{suffix}", samples, 16000, **form
        )
    lines = "".join(f"{speaker}-{speaker}0-{n:04} {text}\n" for n, text in texts.items())
    (folder / f"{speaker}-{speaker}0.trans.txt").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "LibriSpeech"
    chapter(base, "train-clean-100", 20, {1: "ONE", 0: "NOUGHT"})
    chapter(base, "train-clean-100", 103, {0: "IT'S HERE"}, ".wav")
    chapter(base, "dev-clean", 30, {0: "DEV"}, ".opus")
    chapter(base, "test-clean", 40, {0: "TEST"}, ".ogg")
    return tmp_path


def split(corpus) -> tuple[list[Utterance], dict[str, str]]:
    items = list(corpus)
    rejected = {i.source: i.reason for i in items if isinstance(i, Rejected)}
    return [i for i in items if isinstance(i, Utterance)], rejected


@pytest.mark.parametrize("inside", [False, True])
def test_parts_become_splits_in_order_of_ids(root: Path, inside: bool) -> None:
    corpus = read_corpus(
        "librispeech",
        root=root / "LibriSpeech" if inside else root,
        test_parts=["test-clean"],
        transcripts=None,
        synthetic={"hours": 1},
    )
    good, rejected = split(corpus)
    assert not rejected
    assert [(u.id, u.split, u.speaker, u.text) for u in good] == [
        ("103-1030-0000", "train", "103", "IT'S HERE"),
        ("20-200-0000", "train", "20", "NOUGHT"),
        ("20-200-0001", "train", "20", "ONE"),
        ("30-300-0000", "valid", "30", "DEV"),
        ("40-400-0000", "test", "40", "TEST"),
    ]
    assert good[1].source == "train-clean-100/20/200/20-200-0000.flac"
    for utterance in good:
        decoded = utterance.audio.load()
        assert decoded.rate in (16000, 48000)
        assert len(decoded.samples) == decoded.rate // 10
    assert list(corpus) == list(corpus)


def test_damage_is_named_and_nothing_else_is_lost(root: Path, tmp_path: Path) -> None:
    base = root / "LibriSpeech"
    folder = chapter(base, "train-clean-100", 50, dict.fromkeys(range(6), "TEXT"))
    name = "train-clean-100/50/500/50-500-{:04}{}".format
    transcripts = folder / "50-500.trans.txt"
    lines = transcripts.read_text().splitlines()
    lines[1] = ""
    transcripts.write_text("\r\n".join([*lines, "50-500-0002 AGAIN", "50-500-0009 NO AUDIO"]))
    outside = tmp_path / "secret.flac"
    os.replace(folder / "50-500-0003.flac", outside)
    (folder / "50-500-0003.flac").symlink_to(outside)
    os.replace(folder / "50-500-0004.flac", folder / "kept.bin")
    (folder / "50-500-0004.flac").symlink_to("kept.bin")
    (folder / "._50-500-0005.flac").write_bytes(b"left by a Mac")
    folder = chapter(base, "train-clean-100", 51, {0: "TEXT"})
    (folder / "51-510.trans.txt").write_bytes(b"51-510-0000 CAF\xc9\n")
    folder = chapter(base, "train-clean-100", 52, {0: "TEXT"})
    (folder / "52-520.trans.txt").unlink()
    os.mkfifo(folder / "52-520.trans.txt")
    (base / "train-clean-100" / "53").symlink_to(base / "dev-clean" / "30")
    good, rejected = split(read_corpus("librispeech", root=root))
    assert "can't be read" in rejected.pop("train-clean-100/51/510/51-510.trans.txt")
    assert "not a regular file" in rejected.pop("train-clean-100/52/520/52-520.trans.txt")
    assert rejected == {
        "train-clean-100/52/520/52-520-0000.flac": "no transcript",
        "train-clean-100/53": "link to a folder: not followed",
        name(1, ".flac"): "no transcript",
        "train-clean-100/50/500/50-500.trans.txt:7": "duplicate id: a second transcript",
        name(3, ".flac"): "path leaves the corpus folder",
        name(9, ""): "no audio file for this transcript",
        "train-clean-100/51/510/51-510-0000.flac": "no transcript",
    }
    assert [u.id for u in good if u.speaker == "50"] == [f"50-500-000{n}" for n in (0, 2, 4, 5)]
    assert len(good) == 4 + 4


def test_links_are_followed_within_a_part_only(root: Path, tmp_path: Path) -> None:
    """To a file beside it, outside, to nothing, to themselves; audio and transcripts."""
    base = root / "LibriSpeech"
    folder = chapter(base, "train-clean-100", 50, dict.fromkeys(range(5), "TEXT"))
    os.replace(folder / "50-500-0000.flac", folder / "kept.bin")
    os.replace(folder / "50-500-0001.flac", tmp_path / "outside.flac")
    for number, to in enumerate(["kept.bin", tmp_path / "outside.flac", "nothing"]):
        path = folder / f"50-500-{number:04}.flac"
        path.unlink(missing_ok=True)
        path.symlink_to(to)
    (folder / "50-500-0003.flac").unlink()
    (folder / "50-500-0003.flac").symlink_to("50-500-0003.flac")
    other = chapter(base, "train-clean-100", 51, {0: "TEXT"})
    (other / "51-510.trans.txt").unlink()
    (other / "51-510.trans.txt").symlink_to("51-510.trans.txt")
    third = chapter(base, "train-clean-100", 52, {0: "TEXT"})
    os.replace(third / "52-520.trans.txt", tmp_path / "52-520.trans.txt")
    (third / "52-520.trans.txt").symlink_to(tmp_path / "52-520.trans.txt")
    good, rejected = split(read_corpus("librispeech", root=root))
    loop = "not a usable path: Too many levels of symbolic links"
    outside = "path leaves the corpus folder"
    place = "train-clean-100/{0}/{0}0/{0}-{0}0{1}".format
    assert rejected == {
        place(50, "-0001.flac"): outside,
        place(50, "-0003.flac"): loop,
        place(51, ".trans.txt"): loop,
        place(51, "-0000.flac"): "no transcript",
        place(52, ".trans.txt"): outside,
        place(52, "-0000.flac"): "no transcript",
    }
    assert [u.id[-4:] for u in good if u.speaker == "50"] == ["0000", "0002", "0004"]
    corpus = read_corpus("librispeech", root=root)
    summary = write_manifest(corpus, tmp_path / "data", corpus="librispeech", jobs=1)
    reasons = {str(item["id"]): item["reason"] for item in summary.rejected}
    assert reasons["50-500-0002"] == "can't be read: No such file or directory"
    assert any(text.startswith("5 training utterances rejected") for text in summary.warnings)


def test_ids_used_again_in_another_part_are_told_apart(root: Path) -> None:
    chapter(root / "LibriSpeech", "dev-clean", 20, {0: "ANOTHER"})
    good, _ = split(read_corpus("librispeech", root=root))
    assert [(u.id, u.split, u.speaker) for u in good if u.speaker == "20"] == [
        ("20-200-0000", "train", "20"),
        ("20-200-0001", "train", "20"),
        ("dev-clean/20-200-0000", "valid", "20"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "needs the folder"),
        ({"root": "/no/such/folder"}, "no such folder"),
        ({"train_parts": ["train-clean-360"]}, "no part train-clean-360; folders there: dev-clean"),
        ({"train_parts": ["../LibriSpeech"]}, "not the name of a part"),
        ({"train_parts": ["dev-clean"]}, "part named twice: dev-clean"),
    ],
)
def test_wrong_options_are_clear_errors(root: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_corpus("librispeech", **{"root": root, **options}))


def test_unknown_corpora_and_options() -> None:
    with pytest.raises(RecipeError, match="known: librispeech, folder, parquet, synthetic"):
        read_corpus("libri")
    with pytest.raises(RecipeError, match=r"data\.librispeech\.rot: unknown option"):
        read_corpus("librispeech", root=".", librispeech={"rot": 1})
