"""Validation drawn from a corpus that has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_corpora import encoded, noise

from reproduce.data.corpora import Rejected, read_corpus
from reproduce.data.manifest import Manifest, write_manifest
from reproduce.data.packing import Entry
from reproduce.data.splits import DrawnSplits


def entry(number: int, speaker: str = "", split: str = "drawn 0.1") -> Entry:
    return Entry(f"{number}", split, speaker, 1, 0, "x", "x", "x", 16000, 1, 0)


def drawn(count: int, speakers: int = 0, share: float = 0.1) -> list[Entry]:
    """Those that validate of `count`."""
    entries = [
        entry(n, f"s{n % speakers}" if speakers else "", f"drawn {share}") for n in range(count)
    ]
    done = list(map(DrawnSplits(entries), entries))
    assert {e.split for e in done} <= {"train", "valid"}
    return [e for e in done if e.split == "valid" and isinstance(e, Entry)]


def test_by_utterance_or_by_speaker() -> None:
    assert len(drawn(200)) == 20
    assert drawn(200) == drawn(200)
    assert not drawn(200, share=0)
    assert not drawn(1)
    assert len(drawn(3)) == 1
    assert len(drawn(200, 4)) == 20
    valid = drawn(200, 40)
    assert len(valid) == 20
    assert len({e.speaker for e in valid}) == 4


def test_splits_that_a_corpus_has_stay() -> None:
    entries = [entry(1, split="test"), entry(2), Rejected("x", "x", "r", "valid")]
    splits = DrawnSplits(entries)
    assert splits(entries[0]) is entries[0]
    assert splits(entries[2]) is entries[2]
    rejected = Rejected("x", "x", "r", "drawn 0.1")
    assert splits(rejected) == replace(rejected, split="train")


@pytest.mark.parametrize("bad", range(6))
def test_rejecting_an_utterance_does_not_empty_validation(tmp_path: Path, bad: int) -> None:
    """Whichever can't be used: another one validates."""
    root = tmp_path / "corpus"
    root.mkdir()
    for n in range(6):
        data = encoded(noise(0.1, n), form="WAV")
        (root / f"{n}.wav").write_bytes(data[:50] if n == bad else data)
    lines = ["path,text", *(f"{n}.wav,word" for n in range(6))]
    (root / "t.csv").write_text("\n".join(lines))
    corpus = read_corpus("folder", root=root, valid_fraction=0.1)
    summary = write_manifest(corpus, tmp_path / "data", corpus="folder", jobs=1)
    assert summary.utterances == {"train": 4, "valid": 1, "test": 0}
    assert [item["split"] for item in summary.rejected] == ["train"]
    assert set(Manifest.read(tmp_path / "data").rows.to_pandas()["split"]) == {"train", "valid"}
    other = read_corpus("folder", root=root, valid_fraction=0.5)
    again = write_manifest(other, tmp_path / "data", corpus="folder", jobs=1)
    assert (again.outcome, again.utterances["valid"]) == ("made anew", 2)
