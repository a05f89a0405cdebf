"""The stage: what it says, goes on without, requires, draws; killed for real."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from faults import at_most, somebody_else
from small_corpora import Sound, make_part, pack_tree, serving, sounds, write_in_two

from reproduce.data import disk
from reproduce.data.audio import Decoded
from reproduce.data.corpora import Utterance
from reproduce.data.corpora.files import FileAudio
from reproduce.data.figure import draw_corpus
from reproduce.data.manifest import Manifest, write_manifest
from reproduce.data.packing import Journal
from reproduce.data.summary import Summary
from reproduce.errors import DataError, MissingCorpusError, RecipeError, UsageError
from reproduce.grid.plan import plan_lines
from reproduce.recipe import load_recipe
from reproduce.recipe.schema import Recipe
from reproduce.records import WorkFolder
from reproduce.stages.prepare import prepare, summary_lines
from reproduce.tasks.context import open_context
from reproduce.training.distributed import start, stop

TRAIN = {20: {0: "ONE", 1: "TWO"}, 21: {0: "THREE"}}
VALID = {30: {0: "FOUR"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_part(tmp_path / "speech", "train-clean-100", TRAIN)
    make_part(tmp_path / "speech", "dev-clean", VALID)
    return tmp_path / "speech"


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path / "work")


@pytest.fixture
def drawn() -> None:
    """For tests of the figure."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure takes more time than all the rest."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("reproduce.stages.prepare.draw_corpus", lambda folder: folder)


def recipe(root: Path | None, *sets: str) -> Recipe:
    where = [f"data.root={root}"] if root else []
    return load_recipe("as-run", [*where, "data.jobs=1", *sets])


@pytest.mark.usefixtures("drawn")
def test_it_ends_with_a_table_and_a_figure(
    root: Path, work: WorkFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / "train-clean-100/21/1/21-1-0000.flac").write_bytes(b"")
    lines = summary_lines(prepare(recipe(root), work))
    assert lines[0] == "prepared:"
    assert [line.split() for line in lines[1:4]] == [
        ["utterances", "hours", "speakers", "shortest", "median", "longest"],
        ["train", "2", "0.00", "1", *["0.10", "s"] * 3],
        ["valid", "1", "0.00", "1", *["0.10", "s"] * 3],
    ]
    assert lines[4].split()[-1] == Manifest.read(work.data).summary.subsets["10min"]["sha256"]
    assert "warning: train-clean-100 has 3 utterances here, 28539 as published" in lines
    assert lines[-1] == "rejected: 1 (1 x empty file); each is named in data/summary.json"
    assert (work.data / "corpus.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr().err == "", "no progress bar where nobody looks on"


def test_again_changed_and_gone(root: Path, work: WorkFolder) -> None:
    options = recipe(root)
    assert prepare(options, work).outcome == "made"
    times = {path: path.stat().st_mtime_ns for path in work.data.iterdir() if path.name[0] != "."}
    assert summary_lines(prepare(options, work))[0] == "prepared already, nothing to do:"
    assert times == {path: path.stat().st_mtime_ns for path in times}
    before = Manifest.read(work.data)
    make_part(root, "more", {22: {0: "MORE"}})
    shutil.move(root / "more" / "22", root / "train-clean-100" / "22")
    lines = summary_lines(prepare(options, work))
    assert lines[0] == "prepared anew, for the corpus, the data options or data/ itself changed:"
    assert Manifest.read(work.data).sha256 != before.sha256

    shutil.move(root, root.with_name("elsewhere"))
    for gone in (options, recipe(None)):
        summary = prepare(gone, work)
        assert summary.outcome == "there already"
        assert "going on with what was prepared from it before" in summary.warnings[0]
    stored = json.loads(work.summary.read_text())
    assert not any("going on" in text for text in stored["warnings"])


@pytest.mark.parametrize("harm", ["options", "folder", "audio", "manifest", "nothing prepared"])
def test_gone_and_not_surely_the_same_is_an_error(root: Path, work: WorkFolder, harm: str) -> None:
    if harm != "nothing prepared":
        prepare(recipe(root), work)
    options = recipe(root)
    if harm == "options":
        options = recipe(root, "data.subset_seed=1")
    elif harm == "folder":
        options = recipe(root.with_name("other"))
    elif harm == "audio":
        data = bytearray(work.audio.read_bytes())
        data[100] ^= 1
        work.audio.write_bytes(data)
    elif harm == "manifest":
        work.manifest.write_text(work.manifest.read_text().replace("ONE", "TWO"))
    shutil.move(root, root.with_name("elsewhere"))
    with pytest.raises(MissingCorpusError, match="no such folder") as caught:
        prepare(options, work)
    assert ("can't stand in" in str(caught.value)) == (harm != "nothing prepared")


def test_without_a_root_it_says_which_key(work: WorkFolder) -> None:
    with pytest.raises(UsageError, match=r"data\.root: corpus librispeech needs a folder"):
        prepare(recipe(None), work)


def test_a_subset_can_be_required(root: Path, work: WorkFolder) -> None:
    summary = prepare(recipe(root), work)
    listed = (work.data / "subset_10h.tsv").read_bytes()
    sha256 = hashlib.sha256(listed).hexdigest()
    assert summary.subsets["10h"]["sha256"] == sha256
    rows = Manifest.read(work.data).select(split="train", subset="10h")
    columns = (rows.strings(name) for name in ("id", "sha256", "text"))
    lines = ["\t".join(values) + "\n" for values in zip(*columns, strict=True)]
    assert listed.decode() == "".join(lines)

    required = recipe(root, f'data.subset_sha256="{sha256}"')
    assert prepare(required, work).outcome == "there already"
    (root / "train-clean-100/20/1/20-1.trans.txt").write_text("20-1-0000 ONE\n20-1-0001 TOO\n")
    with pytest.raises(DataError, match=f"asks for {sha256}, subset 10h of this corpus has"):
        prepare(required, work)
    ranks = start("cpu")
    try:
        with pytest.raises(DataError, match=f"asks for {sha256}"):
            open_context(required, work, ranks, "pretrain")
    finally:
        stop()


def test_audio_trained_on_and_held_out_is_warned_of_or_refused(
    root: Path, work: WorkFolder
) -> None:
    sound = (root / "train-clean-100/20/1/20-1-0001.flac").read_bytes()
    assert not any("trained on" in text for text in prepare(recipe(root), work).warnings)
    apart = recipe(root, "data.allow_overlap=false")
    assert prepare(apart, work).outcome == "there already"
    (root / "dev-clean/30/1/30-1-0000.flac").write_bytes(sound)
    warning = (
        "the audio of 1 valid utterance is trained on too, the same bytes, so valid results are "
        "better than they would be on other speech: 30-1-0000 (train: 20-1-0001)"
    )
    assert warning in prepare(recipe(root), work).warnings
    assert prepare(recipe(root), work).outcome == "there already"
    ranks = start("cpu")
    try:
        open_context(recipe(root), work, ranks, "pretrain")
        for refused in (
            lambda: prepare(apart, work),
            lambda: open_context(apart, work, ranks, "pretrain"),
        ):
            with pytest.raises(
                DataError, match=r"data\.allow_overlap: false: the audio of 1 val"
            ) as e:
                refused()
            assert e.value.exit_code == 3
    finally:
        stop()


def test_impossible_combinations(root: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(
            root, "data.corpus=parquet", "data.download=true", "data.download_url=ftp://x",
            "data.archives_sha256={dev-clean: abc}", "data.train_parts=[]",
        )  # fmt: skip
    text = str(caught.value)
    for key in ("download", "download_url", "archives_sha256.dev-clean", "train_parts"):
        assert f"data.{key}: " in text


def test_downloaded_from_nothing(
    root: Path, work: WorkFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = ("train-clean-100", "dev-clean")
    files = {f"{p}.tar.gz": pack_tree(tmp_path / f"{p}.tar.gz", root, p) for p in parts}
    sums = {name[:-7]: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    with serving(files) as server:
        options = recipe(
            tmp_path / "new", "data.download=true", f"data.download_url={server.url}",
            f"data.archives_sha256={json.dumps(sums)}",
        )  # fmt: skip
        plan = "\n".join(plan_lines(options, work, ["prepare"]))
        assert "size    about 106.00 h: data/ will take 11.4 GiB" in plan
        assert server.asked == []
        assert prepare(options, work).utterances == {"train": 3, "valid": 1, "test": 0}
    prepare(recipe(root), WorkFolder(tmp_path / "local"))
    for name in ("audio.pcm", "manifest.csv", "manifest.arrow", "subset_10h.tsv"):
        assert (work.data / name).read_bytes() == (tmp_path / "local/data" / name).read_bytes()
    shutil.rmtree(tmp_path / "new")
    assert "going on" in prepare(options, work).warnings[0], "not fetched again"
    assert capfd.readouterr().err == ""


def test_dry_run_tells_the_size_and_touches_nothing(root: Path, work: WorkFolder) -> None:
    def size(options: Recipe) -> str:
        lines = plan_lines(options, work, ["prepare"])
        return next(line.split(maxsplit=1)[1] for line in lines if line.startswith("  size"))

    assert size(recipe(root)).startswith("about 0.00 h in 4 utterances: data/ will take 12.5 KiB, ")
    assert size(recipe(None)).startswith("not known, data.root: ")
    assert size(load_recipe("mini")).startswith("about 0.45 h: data/ will take 49.4 MiB, ")
    assert not work.root.exists()
    prepare(recipe(root), work)
    assert size(recipe(root)) == "0.00 h prepared, 12.5 KiB of audio"


def test_room_is_looked_for_before_anything_is_decoded(
    root: Path, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 5000)
    with pytest.raises(DataError, match=r"packed audio takes 11\.2 KiB, 4\.9 KiB are free"):
        prepare(recipe(root), work)
    assert not work.audio.exists()


def test_room_is_looked_for_where_data_is_made_anew(
    root: Path, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old data stay until the new are whole; where nothing is to do, no room is needed."""
    prepare(recipe(root), work)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 5000)
    assert prepare(recipe(root), work).outcome == "there already"
    with pytest.raises(DataError, match=r"packed audio takes 11\.2 KiB, 4\.9 KiB are free"):
        prepare(recipe(root, "data.subset_seed=1"), work)
    assert Manifest.read(work.data).summary.subset_seed == 42


def test_a_lying_header_does_not_fill_the_disk(root: Path, work: WorkFolder) -> None:
    """A stream's FLAC of unknown length, and one of 2^36 samples: two rejected rows."""
    for number, change in ((0, lambda byte: byte & 0xF0), (1, lambda byte: byte | 0x0F)):
        path = root / f"train-clean-100/20/1/20-1-{number:04}.flac"
        data = bytearray(path.read_bytes())
        data[21], data[22:26] = change(data[21]), bytes([255 * number] * 4)
        path.write_bytes(data)
    line = next(line for line in plan_lines(recipe(root), work, ["prepare"]) if "size" in line)
    assert "about 0.00 h in 4 utterances: data/ will take 6.2 KiB" in line
    summary = prepare(recipe(root), work)
    assert summary.utterances["train"] == 1
    assert summary.reasons() == {
        "its header doesn't say how long it is; encode it again": 1, "too large": 1,
    }  # fmt: skip


@pytest.mark.parametrize("key", ["root", "transcripts"])
def test_a_path_that_is_not_utf_8_is_one_clear_error(
    tmp_path: Path, work: WorkFolder, key: str
) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(bad)
    options = recipe(None)
    options = options.model_copy(update={"data": options.data.model_copy(update={key: bad})})
    with pytest.raises(DataError, match=rf"data\.{key}: the path .*caf\\udce9 isn't UTF-8"):
        prepare(options, work)
    line = next(line for line in plan_lines(recipe(None), work, ["prepare"]) if "size" in line)
    assert "not known" in line


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("name", ["recipe.yaml", "corpus.png"])
def test_a_disk_that_is_full_at_the_ends_is_one_clear_error(
    root: Path, work: WorkFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before and after the data; the figure is whole or absent."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match="can't be written: No space left on device") as caught:
            prepare(recipe(root), work)
    assert caught.value.exit_code == 3
    assert not [path for path in work.root.rglob("*") if path.name.endswith((name, ".tmp"))]
    prepare(recipe(root), work)
    assert (work.data / "corpus.png").exists()


def test_a_disk_that_is_full_at_the_last_step_leaves_the_old_data_whole(
    root: Path, work: WorkFolder
) -> None:
    """Everything new is written before anything changes places."""
    prepare(recipe(root), work)
    before = {path: path.read_bytes() for path in work.data.iterdir() if path.is_file()}
    needed, write = work.summary.stat().st_size // 2, Summary.write

    def full(self: Summary, path: Path) -> None:
        with at_most(needed):
            write(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summary, "write", full)
        with pytest.raises(DataError, match="can't be written: File too large"):
            prepare(recipe(root, "data.subset_seed=1"), work)
    assert {path: path.read_bytes() for path in before} == before
    assert Manifest.read(work.data).summary.subset_seed == 42
    assert prepare(recipe(root, "data.subset_seed=1"), work).outcome == "made anew"


@pytest.mark.parametrize("fault", ["unmounted", errno.ENOTCONN, errno.ESTALE, errno.EMFILE])
def test_a_corpus_that_goes_away_is_not_taken_for_bad_files(
    root: Path, work: WorkFolder, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    """Nothing is rejected for it; once it is back, the same comes of it as without."""
    prepare(recipe(root), work)
    expected = {name: (work.data / name).read_bytes() for name in ("manifest.csv", "audio.pcm")}
    load, add = FileAudio.load, Journal.add

    def lost(self: FileAudio) -> Decoded:
        if "20-1-0001" in self.path.name:
            raise OSError(fault, os.strerror(int(fault)), str(self.path))
        return load(self)

    def unmount(self: Journal, *arguments: Any) -> None:
        if root.exists():
            root.rename(root.with_name("elsewhere"))
        add(self, *arguments)

    other = WorkFolder(work.root.with_name("other"))
    with monkeypatch.context() as patch:
        if fault == "unmounted":
            patch.setattr(Journal, "add", unmount)
        else:
            patch.setattr(FileAudio, "load", lost)
        with pytest.raises(DataError, match="the corpus can't be read any more") as caught:
            prepare(recipe(root), other)
    assert "20-1-000" in caught.value.where
    assert not other.summary.exists()
    if fault == "unmounted":
        root.with_name("elsewhere").rename(root)
    summary = prepare(recipe(root), other)
    assert summary.rejected == []
    assert {name: (other.data / name).read_bytes() for name in expected} == expected


def test_a_file_that_goes_away_is_rejected_alone(root: Path, work: WorkFolder) -> None:
    add = Journal.add

    def remove(self: Journal, *arguments: Any) -> None:
        (root / "train-clean-100/20/1/20-1-0001.flac").unlink(missing_ok=True)
        add(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", remove)
        summary = prepare(recipe(root), work)
    assert summary.reasons() == {"can't be read": 1}


def test_data_of_somebody_else_is_used_where_there_is_nothing_to_do(root: Path) -> None:
    """A folder that is only read: `data/` of another user, or on another mount."""
    with TemporaryDirectory() as name:  # where everybody may look, unlike tmp_path
        Path(name).chmod(0o755)
        corpus, mine = Path(name) / "corpus", WorkFolder(Path(name) / "mine")
        shutil.copytree(root, corpus)
        prepare(recipe(corpus), mine)
        mine.root.chmod(0o777)
        mine.recipe.chmod(0o666)
        mine.data.chmod(0o555)
        with somebody_else():
            assert prepare(recipe(corpus), mine).outcome == "there already"
            with pytest.raises(DataError, match="data: can't be written: Permission denied"):
                prepare(recipe(corpus, "data.subset_seed=1"), mine)
        mine.data.chmod(0o755)


def test_a_figure_of_any_script(tmp_path: Path) -> None:
    texts = ["ab cd", "здравствуй", "你好 $5$", "한국어", "x\u0302", "\u0e01", "𐐀"]
    items = [Utterance(t, "train", "", t, t, Sound(n)) for n, t in enumerate(texts)]
    write_manifest(items, tmp_path, corpus="noise", jobs=1)
    assert draw_corpus(tmp_path).stat().st_size > 10_000


# ------------------------------------------------------------------------------------------ killed


def test_killed_and_called_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, log = tmp_path / "data", tmp_path / "log"
    process = get_context("spawn").Process(target=write_in_two, args=(sounds(str(log)), folder))
    process.start()
    journal = folder / ".partial" / "data" / "journal.jsonl"
    limit = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < limit
        time.sleep(0.005)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = journal.read_bytes().count(b"\n") - 1
    assert 19 <= done < 120
    workers = {int(line.split()[0]) for line in log.read_text().splitlines()}
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they notice
        assert time.monotonic() < limit
        time.sleep(0.01)
    log.unlink()
    # The log isn't part of the listing, so this is the same corpus.
    write_manifest(sounds(str(log)), folder, corpus="noise", jobs=1)
    again = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert again == list(range(done, 120))
    write_manifest(sounds(), tmp_path / "whole", corpus="noise", jobs=1)
    for name in ("audio.pcm", "manifest.csv", "manifest.arrow", "summary.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
