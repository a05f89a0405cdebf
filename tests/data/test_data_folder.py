"""Audio files with a table of transcripts."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from reproduce.data.audio import AudioError
from reproduce.data.corpora import Rejected, Utterance, read_corpus
from reproduce.errors import DataError


def audio(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).standard_normal(800) * 0.1, 16000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "corpus"
    for name in ("a.wav", "b.flac", "sub/c.wav"):
        audio(base / name)
    return base


def read(root: Path, **options) -> tuple[list[Utterance], dict[str, str]]:
    items = list(read_corpus("folder", root=root, **options))
    rejected = {i.source: i.reason for i in items if isinstance(i, Rejected)}
    return [i for i in items if isinstance(i, Utterance)], rejected


ROWS = [
    {"path": "b.flac", "text": 'Ça va, "bien"?', "speaker": "s1", "split": "train"},
    {"path": "a.wav", "text": "здравствуй", "speaker": "s2", "split": "dev"},
    {"path": "sub/c.wav", "text": "NA", "speaker": "NA", "split": "test"},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_three_kinds_say_the_same(root: Path, suffix: str) -> None:
    if suffix == ".jsonl":
        text = "\n".join(json.dumps(row) for row in ROWS)
    elif suffix == ".tsv":
        rows = ["\t".join(row.values()) for row in ROWS]
        text = "\n".join(["file_name\tsentence\tclient_id\tsplit", *rows])
    else:
        rows = [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in ROWS]
        text = "\r\n".join(["\ufeffAudio,Transcript,Speaker_ID,Split", *rows])
    (root / f"table{suffix}").write_text(text, encoding="utf-8")
    good, rejected = read(root)
    assert not rejected
    assert [(u.id, u.source, u.text, u.speaker, u.split) for u in good] == [
        ("b", "b.flac", 'Ça va, "bien"?', "s1", "train"),
        ("a", "a.wav", "здравствуй", "s2", "valid"),
        ("sub/c", "sub/c.wav", "NA", "NA", "test"),
    ]
    assert len(good[0].audio.load().samples) == 800


def test_damage_is_named_and_nothing_else_is_lost(root: Path, tmp_path: Path) -> None:
    audio(tmp_path / "outside.wav")
    (root / "link.wav").symlink_to(tmp_path / "outside.wav")
    (root / "table.csv").write_text(
        "id,path,text,split\n"
        "1,a.wav,fine,train\n"
        "2,../outside.wav,x,train\n"
        "3,link.wav,x,train\n"
        f"4,{tmp_path}/outside.wav,x,train\n"
        "5,gone.wav,x,train\n"
        "6,,x,train\n"
        "7,b.flac,x,tain\n"
        "8,b.flac,one, two,train\n"
        f"9,{root}/sub/../b.flac,fine,train\n"
        "10,nul\0.wav,x,train\n"
    )
    good, rejected = read(root)
    outside = "path leaves the corpus folder"
    assert "not a usable path" in rejected.pop("nul\0.wav")
    assert rejected == {
        "../outside.wav": outside,
        "link.wav": outside,
        f"{tmp_path}/outside.wav": outside,
        "gone.wav": "no such audio file",
        "table.csv: row 6": "no audio file named",
        "b.flac": "unknown split: 'tain', not train, valid or test",
        "table.csv: row 8": "too many fields: 5 in a table of 4 columns, line 9",
        "sub/c.wav": "no transcript in table.csv",
    }
    assert [(u.id, u.source) for u in good] == [("1", "a.wav"), ("9", "b.flac")]


def test_one_bad_line_is_lost_alone(root: Path) -> None:
    (root / "table.csv").write_bytes(
        b'path,text\na.wav,fine\nb.flac,"opened\nsub/c.wav,kept\na.wav,closed"\n'
        b'b.flac,"Hello" she said\nb.flac,caf\xe9\nb.flac,%s\n\nsub/c.wav,"a ""good"", one"\n'
        b'a.wav,an "odd" one' % (b"x" * 200_000)
    )
    good, rejected = read(root)
    assert [(u.source, u.text) for u in good] == [
        ("a.wav", "fine"), ("sub/c.wav", "kept"), ("sub/c.wav", 'a "good", one'),
        ("a.wav", 'an "odd" one'),
    ]  # fmt: skip
    advice = "write a quote within a cell twice and the cell in quotes, an utterance a line"
    assert rejected == {
        "table.csv: row 2": f"broken quotes: line 3, one of them stands alone; {advice}",
        "table.csv: row 4": f"broken quotes: line 5, one of them stands alone; {advice}",
        "table.csv: row 5": f"broken quotes: line 6, text behind a closing one; {advice}",
        "table.csv: row 6": "not UTF-8: line 7, save the table in this encoding",
        "table.csv: row 7": "unreadable line: line 8, field larger than field limit (131072)",
        "b.flac": "no transcript in table.csv",
    }


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_with_the_quotes_of_a_csv(root: Path, quoting: int) -> None:
    texts = ['"Hello", she said', 'five " inches', "plain", "it's"]
    with open(root / "table.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting)  # type: ignore[arg-type]
        writer.writerow(["path", "text"])
        writer.writerows(("a.wav", text) for text in texts)
    assert [u.text for u in read(root)[0]] == texts


def test_quotes_of_a_tsv_are_characters(root: Path) -> None:
    texts = ['"Hello"', 'say "hello" ""', '"', '""', 'a"', '"open']
    (root / "table.tsv").write_text("path\ttext\n" + "".join(f"a.wav\t{t}\n" for t in texts))
    good, _ = read(root)
    assert [u.text for u in good] == texts


def test_absolute_paths_lead_into_a_root_that_is_a_link(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    (root / "c.wav").symlink_to("a.wav")
    (tmp_path / "outside.wav").symlink_to(root / "a.wav")
    paths = [f"{link}/a.wav", f"{root}/b.flac", f"{link}/sub/../sub/c.wav", f"{link}/c.wav"]
    lines = ["path,text", *(f"{path},x" for path in [*paths, tmp_path / "outside.wav"])]
    (root / "table.csv").write_text("\n".join(lines))
    good, rejected = read(link)
    assert [u.source for u in good] == ["a.wav", "b.flac", "sub/c.wav", "c.wav"]
    assert rejected == {f"{tmp_path}/outside.wav": "path leaves the corpus folder"}


def test_a_huge_file_is_refused_unread(root: Path) -> None:
    os.truncate(root / "a.wav", 8 * 2**30)  # sparse: takes no room
    (root / "table.csv").write_text("path,text\na.wav,x\n")
    with pytest.raises(AudioError, match="too large: 8589934592 bytes"):
        read(root)[0][0].audio.load()


def test_damaged_json_lines(root: Path) -> None:
    lines = ['{"path": "a.wav", "text": "ok", "id": 5}', "{", "[1]", '{"path": {"x": 1}}', ""]
    (root / "t.jsonl").write_text("\n".join(lines))
    good, rejected = read(root)
    assert [u.id for u in good] == ["5"]
    assert "not JSON" in rejected["t.jsonl: row 2"]
    assert rejected["t.jsonl: row 3"] == "not a JSON object"
    assert rejected["t.jsonl: row 4"].startswith('text expected: path is {"x": 1}; ')


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('"text": NaN', "text expected: text is NaN; write it in quotes, or leave it out"),
        ('"text": -Infinity', "text expected: text is -Infinity"),
        ('"text": true', "text expected: text is true"),
        ('"text": 5', "text expected: text is 5"),
        ('"text": 1e999', "text expected: text is Infinity"),
        ('"text": ["a"]', 'text expected: text is ["a"]'),
        ('"text": "a", "id": 1.5', "text expected: id is 1.5"),
        ('"text": "a", "speaker": NaN', "text expected: speaker is NaN"),
        ('"text": "a", "split": false', "text expected: split is false"),
        ('"text": "a", "text": "b"', "the same key twice: 'text'"),
        ('"text": "a", "Text ": "a"', "the same key twice: 'text'"),
    ],
)
def test_json_values_that_are_no_text_are_named_row_by_row(
    root: Path, row: str, reason: str
) -> None:
    good = '{"path": "a.wav", "text": "NaN", "id": 7, "speaker": 12, "split": "train"}'
    lines = [good, f'{{"path": "b.flac", {row}}}', '{"path": "sub/c.wav", "split": "dev"}']
    (root / "t.jsonl").write_text("\n".join(lines))
    found, rejected = read(root)
    assert next((u.id, u.text, u.speaker) for u in found) == ("7", "NaN", "12")
    name = "t.jsonl: row 2" if "twice" in reason else "b.flac"
    assert rejected[name].startswith(reason)
    assert [u.text for u in found if u.source == "sub/c.wav"] == [""]


@pytest.mark.parametrize("suffix", [".MP3", ".aiff", ".aif", ".au", ".caf", ".sph", ".w64", ".oga"])
def test_audio_without_a_row_is_listed_whatever_its_suffix(root: Path, suffix: str) -> None:
    (root / f"sub/x{suffix}").write_bytes(b"")
    (root / "table.csv").write_text("path,text\na.wav,x\nb.flac,x\nsub/c.wav,x\n")
    assert read(root)[1] == {f"sub/x{suffix}": "no transcript in table.csv"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found: none"),
        (
            b"a.wav,hello\n",
            "no column path or file or file_name or audio, and no column text or .*a.wav, hello",
        ),
        (b"path,words\na.wav,x\n", "no column text"),
        (b"a,b\nc,d\n", "no column path or .*, and no column text or .*its columns: a, b"),
        (b"", "its columns: none"),
        (b"path,t\xe9xt\na.wav,x\n", "can't be read: not UTF-8: line 1, save the table"),
        (b'path,"text\nb.flac,x\n', "can't be read: broken quotes: line 1, one of them stands al"),
        (b"path,Text,text\na.wav,A,B\n", "can't be read: line 1 names the column 'text' twice"),
    ],
)
def test_a_bad_table_is_one_clear_error(root: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (root / "table.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(root)


def test_which_table(root: Path, tmp_path: Path) -> None:
    for name in ("one.csv", "two.tsv"):
        (root / name).write_text("path,text\na.wav,x\n")
    with pytest.raises(DataError, match=r"found: one\.csv, two\.tsv"):
        read(root)
    assert len(read(root, transcripts="one.csv")[0]) == 1
    os.replace(root / "one.csv", tmp_path / "elsewhere.csv")
    assert len(read(root, transcripts=tmp_path / "elsewhere.csv")[0]) == 1
    with pytest.raises(DataError, match="no such file"):
        read(root, transcripts="three.csv")
