"""The manifest: written by ``prepare``, read by every later stage.

``data/`` is whole or absent: everything is made under ``data/.partial`` and moved into place at the
end, ``summary.json`` last.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.data.audio import BYTES_PER_SAMPLE, SAMPLE_RATE, PackedAudio
from reproduce.data.corpora import SPLITS, Item, Rejected
from reproduce.data.disk import writing
from reproduce.data.packing import Entry, Journal, listing_sha256, pack_into
from reproduce.data.subsets import (
    STUDY_SEED,
    SubsetLists,
    list_name,
    nested_subsets,
    subsets_within,
)
from reproduce.data.summary import Summary, Tally
from reproduce.errors import DataError
from reproduce.records import MANIFEST_COLUMNS, SUBSETS, WorkFolder

if TYPE_CHECKING:
    import pandas as pd


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
) -> Summary:
    """Write ``manifest.csv``, ``audio.pcm``, the lists of the subsets and ``summary.json``, whole
    or not at all.

    Does nothing where they are there already, made from the same listing (same ids, texts, paths,
    file sizes and times) with the same subset seed; makes them anew where anything differs
    (`Summary.outcome` tells). Interrupted and called again, it goes on where it was. One process
    at a time: others wait.

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

    Raises:
        DataError: the corpus can't be listed or holds no good utterance, or the disk is full.
    """
    items = list(utterances) if iter(utterances) is utterances else utterances
    with _locked(folder):
        listing, total = listing_sha256(items)
        if summary := _already_there(folder, listing, subset_seed):
            return summary
        check_room()
        partial = WorkFolder(folder / ".partial")
        journal = Journal(partial.data, listing)
        try:
            pack_into(journal, items, total=total, jobs=jobs or _cores(), progress=progress)
        finally:
            journal.close()
        if not journal.samples:
            raise _nothing_good(journal, corpus)
        tally, subsets = _write_rows(journal, partial.data, corpus, subset_seed)
        before = (folder / "summary.json").exists()
        summary = tally.summary(
            corpus=corpus,
            options=options or {},
            subset_seed=subset_seed,
            listing_sha256=listing,
            manifest_sha256=_sha256(partial.manifest),
            audio_sha256=PackedAudio(partial.audio).sha256(),
            samples=journal.samples,
            subsets=subsets,
        )
        (folder / "summary.json").unlink(missing_ok=True)
        for name in ("audio.pcm", "manifest.csv", *map(list_name, SUBSETS)):
            os.replace(partial.data / name, folder / name)
        summary.write(folder / "summary.json")
        _stamp(folder)
        shutil.rmtree(partial.root)
        return replace(summary, outcome="made anew" if before else "made")


def kept_without_corpus(
    folder: Path, options: Mapping[str, Any], subset_seed: int
) -> Summary | None:
    """What is prepared, for when its corpus is gone: only if it was made with the same options and
    every byte of it is as it was written; None otherwise.

    Options that are None now aren't compared: they say where the corpus lies.
    """
    audio = PackedAudio(folder / "audio.pcm")
    try:
        summary = Summary.read(folder / "summary.json")
        _verify(folder, summary, audio)
    except DataError:
        return None
    wanted = {name: value for name, value in options.items() if value is not None}
    stored = {name: summary.options.get(name) for name in wanted}
    if stored != wanted or summary.subset_seed != subset_seed:
        return None
    return summary if summary.audio_sha256 == audio.sha256() else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes what the folder holds."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _already_there(folder: Path, listing: str, subset_seed: int) -> Summary | None:
    """The summary of what is prepared, if it is whole and was made from this listing."""
    try:
        summary = Summary.read(folder / "summary.json")
        if (summary.listing_sha256, summary.subset_seed) == (listing, subset_seed):
            audio = PackedAudio(folder / "audio.pcm")
            _verify(folder, summary, audio)
            if not _stamped(folder, audio):
                _stamp(folder)
            return summary
    except DataError:
        pass
    return None


def _stamp(folder: Path) -> None:
    """Give the audio and the summary the same time: while it stands, neither was written since.

    Whole seconds, and past ones: no later write has that time by chance.
    """
    time_ns = (time.time_ns() // 10**9 - 2) * 10**9
    for name in ("audio.pcm", "summary.json"):
        os.utime(folder / name, ns=(time_ns, time_ns))


def _stamped(folder: Path, audio: PackedAudio) -> bool:
    return audio.modified == (folder / "summary.json").stat().st_mtime_ns


def _verify(folder: Path, summary: Summary, audio: PackedAudio) -> None:
    """Check that manifest, lists and audio are those of the summary.

    The audio's bytes are read only where its time isn't the one it was given (`_stamp`): it was
    written, copied or exchanged.

    Raises:
        DataError: one is missing or isn't.
    """
    do = f"run `w2vrep prepare RECIPE --work {folder.parent}` to make it anew"
    hashes = {"manifest.csv": summary.manifest_sha256}
    hashes |= {list_name(name): subset["sha256"] for name, subset in summary.subsets.items()}
    for path in (folder / "manifest.csv", audio.path, *(folder / name for name in hashes)):
        if not path.is_file():
            raise DataError("missing", where=str(path), do=do)
    for name, sha256 in hashes.items():
        if _sha256(folder / name) != sha256:
            raise DataError("changed since it was prepared", where=str(folder / name), do=do)
    if len(audio) != summary.samples:
        raise DataError(
            f"{audio.path.stat().st_size} bytes, the manifest needs "
            f"{summary.samples * BYTES_PER_SAMPLE}",
            where=str(audio.path),
            do=do,
        )
    if not _stamped(folder, audio) and audio.sha256() != summary.audio_sha256:
        raise DataError("changed since it was prepared", where=str(audio.path), do=do)


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
    """Write ``manifest.csv`` and the lists of the subsets from the journal."""
    train = array("d")
    for entry in journal:
        if isinstance(entry, Entry) and entry.split == "train":
            train.append(entry.samples / SAMPLE_RATE)
    labels = iter(nested_subsets(train, subset_seed))
    tally = Tally()
    with (
        open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file,
        SubsetLists(folder) as lists,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(MANIFEST_COLUMNS)
        for entry in journal:
            if isinstance(entry, Rejected):
                tally.reject(entry)
                continue
            subset = "all"
            if entry.split == "train":
                subset = next(labels)
                lists.add(subset, entry.id, entry.sha256, entry.text, entry.samples)
            tally.add(entry)
            writer.writerow(
                (
                    entry.id, corpus, entry.split, subset, entry.speaker,
                    entry.samples / SAMPLE_RATE, entry.samples, entry.offset, entry.text,
                    entry.source, entry.sha256,
                )
            )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    return tally, lists.summary()


class Manifest:
    """A prepared corpus.

    Attributes:
        rows: a DataFrame with the manifest's columns, in corpus order.
        audio: the packed samples that ``offset`` and ``samples`` of a row point into.
        summary: ``summary.json``.
        sha256: hash of ``manifest.csv``, the ``manifest_sha256`` of runs made from it.
    """

    def __init__(self, rows: pd.DataFrame, audio: PackedAudio, summary: Summary) -> None:
        self.rows, self.audio, self.summary = rows, audio, summary
        self.sha256 = summary.manifest_sha256

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read `WorkFolder.data`.

        Args:
            folder: where `write_manifest` wrote.
            verify: check that all of it is as it was written.

        Raises:
            DataError: nothing is prepared there, or it was changed since.
        """
        import pandas as pd

        audio = PackedAudio(folder / "audio.pcm")  # opened first: it is what is verified
        summary = Summary.read(folder / "summary.json")
        if verify:
            _verify(folder, summary, audio)
        try:
            rows = pd.read_csv(
                folder / "manifest.csv",
                dtype=str,
                keep_default_na=False,  # a speaker or a transcript may be called "NA"
                encoding="utf-8",
                usecols=list(MANIFEST_COLUMNS),
            )
            rows = rows.astype({"seconds": "float64", "samples": "int64", "offset": "int64"})
        except (OSError, ValueError) as error:
            raise DataError(
                f"can't be read: {error}",
                where=str(folder / "manifest.csv"),
                do=f"run `w2vrep prepare RECIPE --work {folder.parent}` to make it anew",
            ) from None
        return cls(rows, audio, summary)

    def select(
        self,
        *,
        split: str,
        subset: str = "all",
        min_seconds: float | None = None,
        max_seconds: float | None = None,
    ) -> pd.DataFrame:
        """Rows of one split, in corpus order.

        Args:
            split: ``train``, ``valid`` or ``test``.
            subset: the nested subset; it acts on ``train`` only, and ``1h`` holds ``10min``.
            min_seconds: only longer ones (the study kept those longer than 5 s).
            max_seconds: only those not longer.

        Raises:
            ValueError: no such split or subset.
        """
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: {', '.join(SPLITS)}")
        within = subsets_within(subset)
        keep = self.rows["split"] == split
        if split == "train":
            keep &= self.rows["subset"].isin(within)
        if min_seconds is not None:
            keep &= self.rows["seconds"] > min_seconds
        if max_seconds is not None:
            keep &= self.rows["seconds"] <= max_seconds
        return self.rows[keep]
