"""The manifest: written by ``prepare``, read by every later stage.

``data/`` is whole or absent: everything is made under ``data/.partial`` and moved into place at the
end, ``summary.json`` last.
"""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.data.audio import BYTES_PER_SAMPLE, SAMPLE_RATE, SHARD_SAMPLES, PackedAudio
from reproduce.data.columns import ColumnsFile, Rows, map_columns, read_csv
from reproduce.data.corpora import SPLITS, Item, Rejected
from reproduce.data.disk import can_write, writing
from reproduce.data.packing import Entry, Journal, listing_sha256, pack_into
from reproduce.data.splits import DrawnSplits, shared_audio
from reproduce.data.subsets import STUDY_SEED, SubsetLists, list_name, nested_subsets
from reproduce.data.summary import Summary, Tally, shared_lines
from reproduce.data.verified import read_through, remember, sha256_of
from reproduce.errors import DataError
from reproduce.records import MANIFEST_COLUMNS, SUBSETS, WorkFolder


def write_manifest(
    utterances: Iterable[Item],
    folder: Path,
    *,
    corpus: str,
    options: Mapping[str, Any] | None = None,
    subset_seed: int = STUDY_SEED,
    jobs: int = 0,
    progress: bool = False,
    check_room: Callable[[], None] = lambda: None,
    shard_samples: int = SHARD_SAMPLES,
) -> Summary:
    """Write the manifest (``manifest.csv`` and, as columns, ``manifest.arrow``), the packed audio,
    the lists of the subsets and ``summary.json``, whole or not at all.

    Does nothing where they are there already, made from the same listing (same ids, texts, paths,
    file sizes and times) with the same subset seed; makes them anew where anything differs
    (`Summary.outcome` tells). What a version without ``manifest.arrow`` prepared gets one.
    Interrupted and called again, it goes on where it was. One process at a time: others wait.

    Args:
        utterances: in corpus order; iterated more than once, so give what `read_corpus` returns
            (a plain iterator is copied to a list first).
        folder: `WorkFolder.data`.
        corpus: its name, a column of the manifest.
        options: recorded in the summary.
        subset_seed: of the nested subsets.
        jobs: decoding processes; 0 takes one a core.
        progress: show a progress bar, if somebody looks on.
        check_room: called before anything is decoded, if there is something to do.
        shard_samples: more audio than this lies in several files of this length,
            ``audio-0000.pcm`` and on; else in ``audio.pcm``.

    Raises:
        DataError: the corpus can't be listed or holds no good utterance, or the disk is full.
    """
    items = list(utterances) if iter(utterances) is utterances else utterances
    if not can_write(folder):  # somebody else's: good if there is nothing to do
        listing, _ = listing_sha256(items)
        if summary := _already_there(folder, listing, subset_seed):
            return summary
    with _locked(folder):
        listing, total = listing_sha256(items, progress)
        if summary := _already_there(folder, listing, subset_seed):
            return summary
        check_room()
        partial = WorkFolder(folder / ".partial")
        journal = Journal(partial.data, listing, shard_samples)
        try:
            pack_into(journal, items, total=total, jobs=jobs or cores(), progress=progress)
        finally:
            journal.close()
        if not journal.samples:
            raise _nothing_good(journal, corpus)
        tally, subsets = _write_rows(journal, partial.data, corpus, subset_seed)
        shards = journal.shards
        if len(shards) == 1:
            shards = [shards[0].rename(partial.audio)]
        made = [partial.manifest, partial.columns, *shards]
        with _opened(made) as files:
            hashes = read_through(folder, files)
            shared = shared_audio(map_columns(files["manifest.arrow"]))
        before = (folder / "summary.json").exists()
        summary = tally.summary(
            corpus=corpus,
            options=options or {},
            subset_seed=subset_seed,
            listing_sha256=listing,
            manifest_sha256=hashes["manifest.csv"],
            columns_sha256=hashes["manifest.arrow"],
            audio=[
                {
                    "file": path.name,
                    "samples": path.stat().st_size // BYTES_PER_SAMPLE,
                    "sha256": hashes[path.name],
                }
                for path in shards
            ],
            samples=journal.samples,
            subsets=subsets,
            shared=shared,
        )
        summary.write(partial.summary)  # from here on a full disk is no hindrance
        (folder / "summary.json").unlink(missing_ok=True)
        for path in (*made, *(partial.data / list_name(name) for name in SUBSETS)):
            os.replace(path, folder / path.name)
        for path in folder.glob("audio*.pcm"):
            if path.name not in hashes:  # of what was there before
                path.unlink()
        os.replace(partial.summary, folder / "summary.json")
        _remember(folder, summary, _hashes(summary))
        shutil.rmtree(partial.root)
        return replace(summary, outcome="made anew" if before else "made")


def kept_without_corpus(
    folder: Path, options: Mapping[str, Any], subset_seed: int
) -> Summary | None:
    """What is prepared, for when its corpus is gone: only if it was made with the same options and
    every byte of it is as it was written; None otherwise.

    Options that are None now aren't compared: they say where the corpus lies.
    """
    try:
        summary = Manifest.read(folder).summary
    except DataError:
        return None
    wanted = {name: value for name, value in options.items() if value is not None}
    stored = {name: summary.options.get(name) for name in wanted}
    if stored != wanted or summary.subset_seed != subset_seed:
        return None
    if not summary.columns_sha256:
        with _locked(folder):
            return _add_columns(folder, summary)
    return summary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes what the folder holds."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cores() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _already_there(folder: Path, listing: str, subset_seed: int) -> Summary | None:
    """The summary of what is prepared, if it is whole and was made from this listing."""
    try:
        summary = Summary.read(folder / "summary.json")
        if (summary.listing_sha256, summary.subset_seed) != (listing, subset_seed):
            return None
        Manifest.read(folder)
    except DataError:
        return None
    return summary if summary.columns_sha256 else _add_columns(folder, summary)


def _add_columns(folder: Path, summary: Summary) -> Summary:
    """Give what an earlier version prepared its ``manifest.arrow``; nothing else changes."""
    partial = WorkFolder(folder / ".partial")
    partial.data.mkdir(parents=True, exist_ok=True)
    with ColumnsFile(partial.columns) as columns:
        columns.add_all(read_csv(folder / "manifest.csv"))
    with _opened([partial.columns]) as files:
        summary = replace(summary, columns_sha256=read_through(folder, files)["manifest.arrow"])
    os.replace(partial.columns, folder / "manifest.arrow")
    summary.write(folder / "summary.json")
    _remember(folder, summary, ["manifest.arrow"])
    shutil.rmtree(partial.root)
    return summary


def _hashes(summary: Summary) -> dict[str, str]:
    """The files of ``data/`` that a summary speaks of, and their hashes."""
    hashes = {"manifest.csv": summary.manifest_sha256}
    if summary.columns_sha256:
        hashes["manifest.arrow"] = summary.columns_sha256
    hashes |= {list_name(name): subset["sha256"] for name, subset in summary.subsets.items()}
    return hashes | {shard["file"]: shard["sha256"] for shard in summary.audio}


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[dict[str, int]]:
    """Name -> descriptor, for reading."""
    with ExitStack() as stack:
        yield {path.name: stack.enter_context(open(path, "rb")).fileno() for path in paths}


def _remember(folder: Path, summary: Summary, written: Iterable[str]) -> None:
    """Note that all is whole: what was verified, and what was just written.

    The latter is given a time in whole seconds and past: no later write has that by chance.
    """
    time_ns = (time.time_ns() // 10**9 - 2) * 10**9
    hashes = _hashes(summary)
    for name in written:
        os.utime(folder / name, ns=(time_ns, time_ns))
    shards = PackedAudio(*(folder / shard["file"] for shard in summary.audio))
    names = hashes.keys() - {path.name for path in shards.paths}
    with _opened(folder / name for name in names) as files:
        remember(folder, files | shards.by_name(), hashes)


def _verify(folder: Path, summary: Summary, files: Mapping[str, int]) -> None:
    """Check that the open files are those of the summary.

    Raises:
        DataError: one isn't.
    """
    do = _anew(folder)
    for shard in summary.audio:
        size, needed = os.fstat(files[shard["file"]]).st_size, shard["samples"] * BYTES_PER_SAMPLE
        if size != needed:
            raise DataError(
                f"{size} bytes, the manifest needs {needed}",
                where=str(folder / shard["file"]),
                do=do,
            )
    found = sha256_of(folder, files)
    for name, sha256 in _hashes(summary).items():
        if found[name] != sha256:
            raise DataError("changed since it was prepared", where=str(folder / name), do=do)


def _anew(folder: Path) -> str:
    return f"run `w2vrep prepare RECIPE --work {folder.parent}` to make it anew"


def _nothing_good(journal: Journal, corpus: str) -> DataError:
    rejected = [entry for entry in journal if isinstance(entry, Rejected)]
    lines = "".join(f"\n  {item.source}: {item.reason}" for item in rejected[:5])
    more = f"\n  and {len(rejected) - 5} more" if len(rejected) > 5 else ""
    return DataError(
        f"no good utterance:{lines}{more}" if rejected else "no utterance found",
        where=f"corpus {corpus}",
        do="check data.root and the other data options of the recipe",
    )


def _write_rows(
    journal: Journal, folder: Path, corpus: str, subset_seed: int
) -> tuple[Tally, dict[str, dict[str, Any]]]:
    """Write the manifest and the lists of the subsets from the journal."""
    splits = DrawnSplits(journal)
    train = array("d")
    for entry in map(splits, journal):
        if isinstance(entry, Entry) and entry.split == "train":
            train.append(entry.samples / SAMPLE_RATE)
    labels = iter(nested_subsets(train, subset_seed))
    tally = Tally()
    with (
        open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file,
        ColumnsFile(folder / "manifest.arrow") as columns,
        SubsetLists(folder) as lists,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(MANIFEST_COLUMNS)
        for entry in map(splits, journal):
            if isinstance(entry, Rejected):
                tally.reject(entry)
                continue
            subset = "all"
            if entry.split == "train":
                subset = next(labels)
                lists.add(subset, entry.id, entry.sha256, entry.text, entry.samples)
            tally.add(entry)
            row = (
                entry.id, corpus, entry.split, subset, entry.speaker, entry.samples / SAMPLE_RATE,
                entry.samples, entry.offset, entry.text, entry.source, entry.sha256,
            )  # fmt: skip
            writer.writerow(row)
            columns.add(row)
        file.flush()
        os.fsync(file.fileno())
    return tally, lists.summary()


class Manifest:
    """A prepared corpus.

    Attributes:
        rows: all rows, in corpus order: columns that are read from the file when they are used.
        audio: the packed samples that ``offset`` and ``samples`` of a row point into.
        summary: ``summary.json``.
        sha256: hash of ``manifest.csv``, the ``manifest_sha256`` of runs made from it.
    """

    def __init__(self, rows: Rows, audio: PackedAudio, summary: Summary) -> None:
        self.rows, self.audio, self.summary = rows, audio, summary
        self.sha256 = summary.manifest_sha256

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Manifest:
        """Open `WorkFolder.data`.

        Whole files are read only where it isn't remembered that they are as they were written
        (`reproduce.data.verified`). Of what a version without ``manifest.arrow`` prepared, the rows
        are read into memory.

        Args:
            folder: where `write_manifest` wrote.
            verify: check that all of it is as it was written.

        Raises:
            DataError: nothing is prepared there, or it was changed since.
        """
        summary = Summary.read(folder / "summary.json")
        # What is opened is what is verified, and read ever after.
        audio = PackedAudio(*(folder / shard["file"] for shard in summary.audio))
        names = _hashes(summary) if verify else {}
        rows_in = "manifest.arrow" if summary.columns_sha256 else "manifest.csv"
        for path in (folder / name for name in [*names, rows_in]):
            if not path.is_file():
                raise DataError("missing", where=str(path), do=_anew(folder))
        others = {*names, rows_in} - {path.name for path in audio.paths}
        with _opened(folder / name for name in others) as files:
            if verify:
                _verify(folder, summary, files | audio.by_name())
            try:
                if summary.columns_sha256:
                    rows = map_columns(files[rows_in])
                else:
                    rows = read_csv(folder / rows_in)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"can't be read: {error}", where=str(folder / rows_in), do=_anew(folder)
                ) from None
        return cls(rows, audio, summary)

    def require_apart(self) -> None:
        """Check that no audio of training is held out too.

        Raises:
            DataError: some is.
        """
        if lines := shared_lines(shared_audio(self.rows)):
            raise DataError(
                "; ".join(lines),
                where="data.allow_overlap: false",
                do="take them out of one split, or go on all the same with "
                "--set data.allow_overlap=true",
            )

    def select(
        self,
        *,
        split: str,
        subset: str = "all",
        min_seconds: float | None = None,
        max_seconds: float | None = None,
    ) -> Rows:
        """Rows of one split, in corpus order.

        Args:
            split: ``train``, ``valid`` or ``test``.
            subset: the nested subset; it acts on ``train`` only, and ``1h`` holds ``10min``.
            min_seconds: only longer ones (the study kept those longer than 5 s).
            max_seconds: only those not longer.

        Raises:
            ValueError: no such split or subset.
        """
        keep = self.rows.array("split") == SPLITS.index(split)
        within = SUBSETS.index(subset)
        if split == "train":
            keep &= self.rows.array("subset") <= within
        if min_seconds is not None:
            keep &= self.rows.array("seconds") > min_seconds
        if max_seconds is not None:
            keep &= self.rows.array("seconds") <= max_seconds
        return self.rows.take(np.flatnonzero(keep))
