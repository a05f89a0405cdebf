"""What opening a prepared corpus takes, up to sixty thousand hours and more.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 100000           a try

The manifest's columns are real (a row has about 300 bytes); manifest.csv and the audio are files
with nothing but a hole of the right size, noted as verified as `prepare` notes what it wrote. Each
size is opened in processes of its own, as a training stage does it: manifest, selection (longer
than 5 s), speech, the plan's first update and its batches. Memory is above that of the imports:
what a process holds for itself, and pages of the mapped file, which all processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from machine import describe

from reproduce.data.audio import SHARD_SAMPLES, shard_name
from reproduce.data.batches import Plan, Speech
from reproduce.data.columns import CODED, ROWS_A_BATCH, SCHEMA
from reproduce.data.manifest import Manifest, _hashes, _remember
from reproduce.data.summary import Summary

SECONDS = (2.0, 16.0)
"""Shortest and longest utterance."""


def make(folder: Path, rows: int) -> None:
    """``data/`` of so many rows: columns, and holes."""
    rng = np.random.default_rng(0)
    end = 0
    known = {name: pa.array(values) for name, values in CODED.items()}
    texts = {  # the same in every batch
        "id": pa.array([f"1234-5678-{n:06}" for n in range(ROWS_A_BATCH)]),
        "corpus": pa.array(["librispeech"] * ROWS_A_BATCH),
        "speaker": pa.array([f"{n % 5000}" for n in range(ROWS_A_BATCH)]),
        "text": pa.array(["SOME WORDS THAT NOBODY READS " * 4] * ROWS_A_BATCH),
        "source": pa.array(["train/1234/5678/1234-5678-0001.flac"] * ROWS_A_BATCH),
        "sha256": pa.array(["0" * 64] * ROWS_A_BATCH),
    }
    with (
        pa.OSFile(str(folder / "manifest.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for first in range(0, rows, ROWS_A_BATCH):
            count = min(ROWS_A_BATCH, rows - first)
            samples = np.round(rng.uniform(*SECONDS, count) * 16000).astype(np.int64)
            ends = end + np.cumsum(samples)
            split = np.where(np.arange(first, first + count) % 1000 == 0, 1, 0).astype(np.int8)
            columns = {
                **{name: values.slice(0, count) for name, values in texts.items()},
                "split": pa.DictionaryArray.from_arrays(pa.array(split), known["split"]),
                "subset": pa.DictionaryArray.from_arrays(
                    pa.array(np.full(count, 3, np.int8)), known["subset"]
                ),
                "seconds": pa.array(samples / 16000),
                "samples": pa.array(samples),
                "offset": pa.array(ends - samples),
            }
            writer.write_batch(pa.record_batch([columns[n] for n in SCHEMA.names], SCHEMA))
            end = int(ends[-1])
    audio = []
    for number, start in enumerate(range(0, end, SHARD_SAMPLES)):
        samples_here = min(SHARD_SAMPLES, end - start)
        name = shard_name(number)
        with open(folder / name, "wb") as file:
            file.truncate(2 * samples_here)
        audio.append({"file": name, "samples": samples_here, "sha256": "0" * 64})
    with open(folder / "manifest.csv", "wb") as file:
        file.truncate(250 * rows)
    summary = Summary(
        corpus="made up", options={}, subset_seed=42, listing_sha256="", manifest_sha256="0" * 64,
        samples=end, utterances={}, hours={"train": end / 16000 / 3600}, speakers={}, lengths={},
        subsets={}, conversions={}, audio=audio, columns_sha256="0" * 64,
    )  # fmt: skip
    summary.write(folder / "summary.json")
    _remember(folder, summary, _hashes(summary))


def memory() -> dict[str, float]:
    """MiB of this process: its own, and pages of files."""
    status = Path("/proc/self/status").read_text()
    return {
        name: int(found[1]) / 1024
        for name in ("RssAnon", "RssFile", "VmHWM")
        if (found := re.search(rf"{name}:\s+(\d+) kB", status))
    }


def open_and_measure(folder: Path) -> dict[str, float]:
    """As a training stage does it."""
    before, started = memory(), time.perf_counter()
    manifest = Manifest.read(folder)
    opened = time.perf_counter()
    train = manifest.select(split="train", min_seconds=5.0)
    manifest.select(split="valid")
    speech = Speech(train, manifest.audio, crop_seconds=15.6)
    chosen = time.perf_counter()
    plan = Plan(len(speech), 16, 4, seed=1)
    for positions in plan.update(1):
        speech.collate(positions)
    ended, after = time.perf_counter(), memory()
    assert "pandas" not in sys.modules
    return {
        "manifest": opened - started,
        "select": chosen - opened,
        "first": ended - chosen,
        "own": after["RssAnon"] - before["RssAnon"],
        "shared": after["RssFile"] - before["RssFile"],
        "peak": after["VmHWM"] - before["VmHWM"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000, 3_000_000, 30_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the made-up corpora lie")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(open_and_measure(Path(options.one))))
        return
    print(
        "| rows | hours | files of audio | open, s | select, s | first update, s | "
        "own memory, MiB | shared, MiB | peak, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            make(folder, rows)
            command = [sys.executable, __file__, "--one", name]
            found = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(options.repeats)
            ]
            hours = sum(Summary.read(folder / "summary.json").hours.values())
            files = len(list(folder.glob("audio-*.pcm")))
        middle = {key: sorted(one[key] for one in found)[len(found) // 2] for key in found[0]}
        cells = [str(rows), f"{hours:.0f}", str(files)]
        cells += [f"{middle[key]:.2f}" for key in ("manifest", "select", "first")]
        cells += [f"{middle[key]:.0f}" for key in ("own", "shared", "peak")]
        print("| " + " | ".join(cells) + " |", flush=True)
    what = f"median of {options.repeats} processes, one after another; {os.cpu_count()} cores"
    print(f"\n{what}; {describe(torch.device('cpu'), ['torch', 'pyarrow', 'numpy'])}.")


if __name__ == "__main__":
    main()
