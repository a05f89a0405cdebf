"""Parquet shards in the Hugging Face layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpora import encoded, make_part, noise

from reproduce.data.corpora import Rejected, Utterance, corpus_hours, parquet, read_corpus
from reproduce.data.manifest import Manifest, write_manifest
from reproduce.errors import DataError, MissingCorpusError

LENGTHS = [0.1 + 0.01 * (n % 7) for n in range(30)]
FILES = [encoded(noise(seconds, n)) for n, seconds in enumerate(LENGTHS)]
ROWS = [
    {
        "file": f"20-1-{n:04}.flac",
        "audio": {"bytes": data, "path": f"20-1-{n:04}.flac"},
        "text": f"TEXT {chr(65 + n % 26)}",
        "speaker_id": 20 + n % 2,
        "chapter_id": 1,
        "id": f"20-1-{n:04}",
    }
    for n, data in enumerate(FILES)
]


def write(path: Path, rows: Sequence[dict[str, Any]], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Rows 25 and on validate; the order of ids isn't that of the rows."""
    base = tmp_path / "hub"
    order = np.random.default_rng(3).permutation(25)
    shuffled = [ROWS[n] for n in order]
    write(base / "clean/train.100/0000.parquet", shuffled[:14])
    write(base / "clean/train.100/0001.parquet", shuffled[14:])
    write(base / "clean/validation/0000.parquet", ROWS[25:])
    return base


def ids(root: Path, **options: Any) -> list[str]:
    return [item.id for item in read_corpus("parquet", root=root, **options)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_keep_their_order_and_bytes(root: Path, tmp_path: Path, jobs: int) -> None:
    """The row order is what the study's permutation acts on."""
    corpus = read_corpus("parquet", root=root)
    summary = write_manifest(corpus, tmp_path / "data", corpus="parquet", jobs=jobs)
    rows = Manifest.read(tmp_path / "data").rows.to_pandas()
    order = [*np.random.default_rng(3).permutation(25), *range(25, 30)]
    assert rows["id"].tolist() == [ROWS[n]["id"] for n in order]
    assert rows["sha256"].tolist() == [hashlib.sha256(FILES[n]).hexdigest() for n in order]
    assert rows["seconds"].tolist() == [round(LENGTHS[n] * 16000) / 16000 for n in order]
    assert rows["text"].tolist() == [ROWS[n]["text"] for n in order]
    assert rows["speaker"].tolist() == [str(ROWS[n]["speaker_id"]) for n in order]
    assert rows["source"][13] == "clean/train.100/0000.parquet#13"
    assert rows["source"][14] == "clean/train.100/0001.parquet#0"
    assert rows["split"].tolist() == ["train"] * 25 + ["valid"] * 5
    assert not summary.rejected
    assert corpus_hours("parquet", root=root) == pytest.approx(sum(LENGTHS) / 3600, rel=0.1)


def test_the_same_order_gives_the_same_subset_as_a_tree(tmp_path: Path) -> None:
    make_part(tmp_path, "train-clean-100", {20: dict.fromkeys(range(9), "A")})
    make_part(tmp_path, "dev-clean", {30: {0: "B"}})
    for part in ("train-clean-100", "dev-clean"):
        files = sorted((tmp_path / part).rglob("*.flac"))
        rows = [
            {"audio": {"bytes": f.read_bytes(), "path": f.name}, "text": "A" if part[0] == "t"
             else "B"} for f in files
        ]  # fmt: skip
        write(tmp_path / "shards" / part / "0.parquet", rows)
    made = [
        write_manifest(read_corpus(name, root=root), tmp_path / name, corpus=name, jobs=1)
        for name, root in (("librispeech", tmp_path), ("parquet", tmp_path / "shards"))
    ]
    assert made[0].subsets == made[1].subsets
    assert made[0].audio == made[1].audio


@pytest.mark.parametrize(
    ("part", "count"),
    [("clean/train.100", 25), ("train-clean-100", 25), ("clean/train.100/0001.parquet", 11),
     ("clean/*/0000.parquet", 19)],
)  # fmt: skip
def test_parts_are_folders_shards_patterns_or_names(root: Path, part: str, count: int) -> None:
    found = ids(root, train_parts=[part], valid_parts=[])
    assert len(found) == count


def test_missing_and_impossible_parts(root: Path) -> None:
    with pytest.raises(MissingCorpusError, match=r"folders with shards: clean/train\.100, "):
        ids(root, train_parts=["train-clean-360"])
    for part in ("../hub/clean", "/etc"):
        with pytest.raises(DataError, match="not the name of a part"):
            ids(root, train_parts=[part])


def test_rows_may_lack_what_is_not_needed(tmp_path: Path) -> None:
    rows = [
        {"audio": {"bytes": FILES[0], "path": "a/b.flac"}, "sentence": "one"},
        {"audio": {"bytes": FILES[1], "path": None}, "sentence": "two"},
        {"audio": {"bytes": None, "path": "c.flac"}, "sentence": "three"},
        {"audio": None, "sentence": "four"},
        {"audio": {"bytes": FILES[2], "path": "d.flac"}, "sentence": None},
        {"audio": {"bytes": b"noise", "path": "e.flac"}, "sentence": "six"},
        {"audio": {"bytes": FILES[3], "path": "a/b.flac"}, "sentence": "seven"},
        {"audio": {"bytes": FILES[3], "path": "x/b.flac"}, "sentence": "eight"},
    ]
    write(tmp_path / "t.parquet", rows, group=3)
    corpus = read_corpus("parquet", root=tmp_path, train_parts=["t.parquet"], valid_parts=[])
    summary = write_manifest(corpus, tmp_path / "data", corpus="parquet", jobs=1)
    assert Manifest.read(tmp_path / "data").rows.strings("id")[:] == ["a/b", "t.parquet-1", "x/b"]
    assert [(r["source"], r["reason"].partition(":")[0]) for r in summary.rejected] == [
        ("t.parquet#2", "empty file"),
        ("t.parquet#3", "empty file"),
        ("t.parquet#4", "no transcript"),
        ("t.parquet#5", "can't be decoded"),
        ("t.parquet#6", "duplicate id"),
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(),
     pa.large_binary(), pa.string_view()],
    ids=str,
)  # fmt: skip
def test_texts_are_strings_or_bytes_in_utf_8(tmp_path: Path, kind: pa.DataType) -> None:
    """Whatever the column's type, the same texts and ids; what isn't UTF-8 is one bad row."""
    texts: list[Any] = ["ONE", "දෙක", None, "FOUR"]
    column = pa.array(texts, pa.string()).cast(kind)
    audio = pa.array([row["audio"] for row in ROWS[:4]])
    ids = pa.array(["a", "b", "c", "d"]).cast(kind)
    pq.write_table(pa.table({"audio": audio, "text": column, "id": ids}), tmp_path / "t.parquet")
    found = list(read_corpus("parquet", root=tmp_path, train_parts=["t.parquet"], valid_parts=[]))
    assert [(item.id, item.text) for item in found] == [
        ("a", "ONE"), ("b", "දෙක"), ("c", ""), ("d", "FOUR"),
    ]  # fmt: skip


@pytest.mark.parametrize("column", ["text", "id", "speaker"])
@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_a_row_that_is_not_utf_8_is_rejected(
    tmp_path: Path, kind: pa.DataType, column: str
) -> None:
    values = pa.array([b"ONE", b"caf\xe9", b"THREE"])
    bad = values.view(pa.string()) if kind == pa.string() else values
    columns = {"text": pa.array(["A", "B", "C"]), column: bad}
    table = pa.table({"audio": pa.array([row["audio"] for row in ROWS[:3]]), **columns})
    pq.write_table(table, tmp_path / "t.parquet")
    corpus = read_corpus("parquet", root=tmp_path, train_parts=["t.parquet"], valid_parts=[])
    items = list(corpus)
    assert [type(item) for item in items] == [Utterance, Rejected, Utterance]
    what = "transcript" if column == "text" else column
    assert (items[1].source, items[1].reason) == ("t.parquet#1", f"{what} isn't UTF-8")
    summary = write_manifest(corpus, tmp_path / "data", corpus="parquet", jobs=1)
    assert (summary.utterances["train"], len(summary.rejected)) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ["A", "B"]}, r"column text holds list<.*: string>, not text"),
        ({"text": 5}, "column text holds int64, not text"),
        ({"text": 0.5}, "column text holds double, not text"),
        ({"id": [1]}, r"column id holds list<.*: int64>, not text"),
        ({"speaker_id": {"a": 1}}, "column speaker_id holds struct<a: int64>, not text"),
        ({"audio": {"bytes": [1], "path": "a"}}, r"column audio\.bytes holds list"),
    ],
)
def test_columns_of_other_types_are_one_clear_error(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write(tmp_path / "t.parquet", [{**ROWS[0], **fields}])
    with pytest.raises(DataError, match=message):
        ids(tmp_path, train_parts=["t.parquet"], valid_parts=[])


def test_ids_used_again_in_another_part_are_told_apart(tmp_path: Path) -> None:
    """As in data sets that number the rows of each part from 0."""
    for part, first in (("train", 0), ("dev", 5)):
        rows = [{**row, "id": str(n % 4)} for n, row in enumerate(ROWS[first : first + 5])]
        write(tmp_path / part / "0.parquet", rows)
    parts = {"train_parts": ["train"], "valid_parts": ["dev"]}
    corpus = read_corpus("parquet", root=tmp_path, **parts)
    summary = write_manifest(
        corpus, tmp_path / "data", corpus="parquet", options=parts, jobs=1
    )  # fmt: skip
    rows = Manifest.read(tmp_path / "data").rows.to_pandas()
    names = ["0", "1", "2", "3"]
    assert rows["id"].tolist() == [*names, *(f"dev/{name}" for name in names)]
    assert [item["id"] for item in summary.rejected] == ["0", "dev/0"]
    assert summary.warnings[:3] == [
        "1 training utterance rejected: subsets are drawn from the rest, so they aren't those of "
        "the whole corpus",
        "4 duplicate ids in dev, which an earlier part has too: written dev/ID",
        "2 duplicate ids, only the first utterance of each is kept: 0, dev/0",
    ]


def test_damaged_shards_are_one_clear_error(root: Path) -> None:
    shard = root / "clean/train.100/0001.parquet"
    data = shard.read_bytes()
    for content in (b"", b"PAR1 nonsense PAR1", data[: len(data) // 2]):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"0001\.parquet: can't be read"):
            ids(root)
    shard.write_bytes(data)
    group = pq.read_metadata(shard).row_group(1)
    columns = [group.column(n) for n in range(group.num_columns)]
    audio = next(column for column in columns if column.path_in_schema == "audio.bytes")
    place = audio.dictionary_page_offset or audio.data_page_offset
    shard.write_bytes(data[:place] + bytes([255] * 20) + data[place + 20 :])
    items = list(read_corpus("parquet", root=root))  # the other columns are whole
    with pytest.raises(DataError, match=r"0001\.parquet: can't be read"):
        [item.audio.fetch() for item in items]
    write(shard, [{"audio": "a path", "text": "A"}])
    with pytest.raises(DataError, match="no column audio with the audio file's bytes; its columns"):
        ids(root)
    write(shard, [{"audio": ROWS[0]["audio"], "words": "A"}])
    with pytest.raises(DataError, match="no column text or transcript"):
        ids(root)


def test_links_into_a_hub_cache_are_followed_and_others_are_not(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "datasets--x"
    snapshot = cache / "snapshots" / "0123"
    (snapshot / "data").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_bytes((root / "clean/validation/0000.parquet").read_bytes())
    (snapshot / "data" / "0.parquet").symlink_to("../../../blobs/abc")
    (snapshot / "data" / "1.parquet").symlink_to(root / "clean/validation/0000.parquet")
    items = list(read_corpus("parquet", root=snapshot, train_parts=["data"], valid_parts=[]))
    assert [type(item) for item in items] == [Utterance] * 5 + [Rejected]
    assert items[-1] == Rejected("data/1.parquet", None, "path leaves the corpus folder")


def test_reading_on_opens_a_row_group_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    audio = parquet._audio

    def count(shard: Path, group: int) -> Any:
        opened.append((shard.name, group))
        return audio(shard, group)

    monkeypatch.setattr(parquet, "_audio", count)
    monkeypatch.setattr(parquet, "_reader", parquet._Reader())
    items = list(read_corpus("parquet", root=root, valid_parts=[]))
    fetched = [item.audio.fetch().data for item in items[3:]]  # as when packing goes on
    order = np.random.default_rng(3).permutation(25)
    assert fetched == [FILES[n] for n in order[3:]]
    assert opened == [("0000.parquet", g) for g in range(4)] + [
        ("0001.parquet", g) for g in range(3)
    ]
