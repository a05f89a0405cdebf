"""How fast `w2vrep prepare` packs speech and what memory it takes, at 1, 10 and 100 hours.

    python benchmarks/prepare.py                                   # some 15 minutes, 20 GB of disk
    python benchmarks/prepare.py --hours 0.05 0.1 --distinct 0.05  # a minute, to see that it runs

Some speech is synthesized and encoded once; larger corpora hold it again under other names (hard
links, so what is read comes from memory: decoding is measured, not the disk). Each measurement is a
fresh process that makes a new ``data/``. Prints Markdown. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

FORMATS = ("flac", "opus", "parquet")
CHAPTER = 100
"""Utterances a folder, and a row group."""
SHARD = 2000
"""Rows a Parquet file."""


def synthesize(folder: Path, hours: float) -> list[tuple[Path, Path, str, float]]:
    """Distinct utterances as FLAC and Opus: two files, text and seconds of each."""
    import soundfile
    from tqdm import tqdm

    from reproduce.data.corpora.synthetic import utterances

    made = []
    corpus = list(utterances(hours=hours, valid_hours=0.0, speakers=8, valid_speakers=0, seed=0))
    for number, utterance in enumerate(tqdm(corpus, "synthesizing", unit="utt", disable=None)):
        decoded = utterance.audio.load()
        flac, opus = folder / f"{number}.flac", folder / f"{number}.opus"
        soundfile.write(flac, decoded.samples, decoded.rate, subtype="PCM_16")
        soundfile.write(opus, decoded.samples, decoded.rate, format="OGG", subtype="OPUS")
        made.append((flac, opus, utterance.text, len(decoded.samples) / decoded.rate))
    return made


def copies(
    made: list[tuple[Path, Path, str, float]], hours: float
) -> Iterator[tuple[int, int, Path, Path, str]]:
    """Speaker, number, files and text of each utterance until there are `hours` of speech."""
    seconds, number = 0.0, 0
    while seconds < hours * 3600:
        flac, opus, text, length = made[number % len(made)]
        yield 1000 + number // CHAPTER, number % CHAPTER, flac, opus, text
        seconds, number = seconds + length, number + 1


def build(
    folder: Path, form: str, made: list[tuple[Path, Path, str, float]], hours: float
) -> dict[str, Any]:
    """A corpus in one format; returns how `read_corpus` opens it."""
    if form == "parquet":
        return build_parquet(folder, made, hours)
    for speaker, number, flac, opus, text in copies(made, hours):
        chapter = folder / "train" / str(speaker) / "1"
        chapter.mkdir(parents=True, exist_ok=True)
        id_ = f"{speaker}-1-{number:04}"
        os.link(flac if form == "flac" else opus, chapter / f"{id_}.{form}")
        with open(chapter / f"{speaker}-1.trans.txt", "a", encoding="utf-8") as file:
            file.write(f"{id_} {text}\n")
    return {"name": "librispeech", "root": str(folder), "train_parts": ["train"], "valid_parts": []}


def build_parquet(
    folder: Path, made: list[tuple[Path, Path, str, float]], hours: float
) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(copies(made, hours))
    (folder / "train").mkdir(parents=True)
    for first in range(0, len(rows), SHARD):
        path = folder / "train" / f"{first // SHARD:04}.parquet"
        writer = None
        for start in range(first, min(first + SHARD, len(rows)), CHAPTER):
            some = rows[start : min(start + CHAPTER, first + SHARD)]
            ids = [f"{speaker}-1-{number:04}" for speaker, number, *_ in some]
            audio = [
                {"bytes": flac.read_bytes(), "path": f"{id_}.flac"}
                for id_, (_, _, flac, _, _) in zip(ids, some, strict=True)
            ]
            table = pa.table(
                {
                    "audio": audio,
                    "text": [text for *_, text in some],
                    "speaker_id": [speaker for speaker, *_ in some],
                    "chapter_id": [1] * len(some),
                    "id": ids,
                }
            )
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table, row_group_size=CHAPTER)
        if writer is not None:
            writer.close()
    return {"name": "parquet", "root": str(folder), "train_parts": ["train"], "valid_parts": []}


def measure(options: dict[str, Any], jobs: int, folder: Path) -> dict[str, float]:
    """Prepare in a fresh process; what it used."""
    out = folder / "out"
    command = [sys.executable, __file__, "--one", json.dumps([options, jobs, str(out)])]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    numbers: dict[str, float] = json.loads(result.stdout)
    return numbers


def one(arguments: str) -> None:
    """In the fresh process: prepare, and print what it used as JSON."""
    from reproduce.data.corpora import read_corpus
    from reproduce.data.manifest import write_manifest

    options, jobs, out = json.loads(arguments)
    name = options.pop("name")
    peaks: dict[int, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, done))
    watcher.start()
    start = time.perf_counter()
    summary = write_manifest(read_corpus(name, **options), Path(out), corpus=name, jobs=jobs)
    wall = time.perf_counter() - start
    done.set()
    watcher.join()
    if summary.rejected:
        sys.exit(f"rejected: {summary.rejected[:3]}")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    main = peaks.pop(os.getpid())
    numbers = {
        "seconds": sum(summary.hours.values()) * 3600,
        "wall": wall,
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in used),
        "main": main,
        "worker": max(peaks.values(), default=0.0),
    }
    print(json.dumps(numbers))


def watch(peaks: dict[int, float], done: threading.Event) -> None:
    """Peak resident memory of this process and its workers, in MiB.

    From /proc: what getrusage says holds the parent's too, from before a process became another.
    """
    while not done.wait(0.2):
        for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = next(line for line in lines if line.startswith("VmHWM"))
                peaks[pid or 0] = int(peak.split()[1]) / 1024


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--distinct", type=float, default=1.0, help="hours really synthesized")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--jobs", type=int, nargs="+", default=sorted({1, cores or 1}))
    parser.add_argument("--repeats", type=int, default=1, help="medians of so many are shown")
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "speech").mkdir()
        made = synthesize(folder / "speech", arguments.distinct)
        print(
            f"{platform.machine()}, {cores} cores, load before {os.getloadavg()[0]:.1f}, ", end=""
        )
        print(f"Python {platform.python_version()}; medians of {arguments.repeats}\n")
        print("| format | hours | jobs | wall, s | x real time | a core | a CPU second "
              "| main process, MiB | a worker, MiB |")  # fmt: skip
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        grown: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for form in arguments.formats:
            for hours in arguments.hours:
                corpus = folder / f"{form}-{hours}"
                options = build(corpus, form, made, hours)
                taken: dict[int, list[dict[str, float]]] = {jobs: [] for jobs in arguments.jobs}
                for _ in range(arguments.repeats):  # in turns: other work on the machine hits all
                    for jobs in arguments.jobs:
                        taken[jobs].append(measure(options, jobs, folder))
                for jobs, numbers in taken.items():
                    n = {key: median(each[key] for each in numbers) for key in numbers[0]}
                    rate = n["seconds"] / n["wall"]
                    print(
                        f"| {form} | {n['seconds'] / 3600:.2f} | {jobs} | {n['wall']:.1f} | "
                        f"{rate:.0f} | {rate / jobs:.0f} | {n['seconds'] / n['cpu']:.0f} | "
                        f"{n['main']:.0f} | {n['worker']:.0f} |",
                        flush=True,
                    )
                    memory = n["main"] + jobs * n["worker"]
                    grown.setdefault((form, jobs), []).append(
                        (n["seconds"] / 3600, n["seconds"] / n["cpu"], memory)
                    )
                shutil.rmtree(corpus)
        print("\nGrowth from the least to the most hours (memory: main process and all workers):\n")
        for (form, jobs), points in grown.items():
            (h0, r0, m0), (h1, r1, m1) = points[0], points[-1]
            if h1 > h0:
                slope = (m1 - m0) / (h1 - h0)
                print(
                    f"- {form}, {jobs} jobs: hours x {h1 / h0:.0f}; audio a CPU second x "
                    f"{r1 / r0:.2f}; memory x {m1 / m0:.2f}, {slope:.2f} MiB an hour"
                )


if __name__ == "__main__":
    main()
