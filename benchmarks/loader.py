"""Seconds of audio a second that reach training from packed audio, from 1 h to 100 h of it.

    python benchmarks/loader.py
    python benchmarks/loader.py --hours 1 10 --updates 5     a try

Plan, Speech and prefetch as the training loop uses them, with nobody to use the batches: the rate
that an accelerator could be fed at. The packed audio is one hour of noise in a file with a hole
behind it, which the system reads like a file it holds in memory; the disk isn't measured. Each size
runs in a process of its own. Memory is what the process holds for itself; pages of the mapped file
are the system's to drop.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from machine import describe, spread

from reproduce.data.audio import SAMPLE_RATE, PackedAudio
from reproduce.data.batches import Batch, Plan, Speech, prefetch
from reproduce.data.columns import Rows
from reproduce.position import generator

LOW, HIGH, CROP = 6.0, 16.0, 15.6
"""Seconds of the shortest and the longest utterance, and where they are cropped."""


def make_audio(folder: Path, hours: float) -> Rows:
    """Packed audio of so many hours and its manifest rows."""
    rng = np.random.default_rng(0)
    total = round(hours * 3600 * SAMPLE_RATE)
    drawn = rng.uniform(LOW, HIGH, int(total / (LOW * SAMPLE_RATE)) + 1)
    ends = np.cumsum(np.round(drawn * SAMPLE_RATE).astype(np.int64))
    ends = ends[: int(np.searchsorted(ends, total)) + 1]
    samples = np.diff(ends, prepend=0)
    with (folder / "audio.pcm").open("wb") as file:
        noise = rng.normal(0, 3000, min(int(ends[-1]), 3600 * SAMPLE_RATE))
        file.write(noise.astype("<i2").tobytes())
        file.truncate(int(ends[-1]) * 2)
    count = len(samples)
    table = pa.table(
        {
            "id": [f"utterance-{n:06d}" for n in range(count)],
            "samples": samples,
            "offset": ends - samples,
            "text": ["SOME WORDS THAT NOBODY READS"] * count,
        }
    )
    return Rows(table)


def own_memory() -> float:
    """What this process holds for itself, MiB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else float("nan")


def measure(options: argparse.Namespace, hours: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = make_audio(folder, hours)
        started = time.perf_counter()
        speech = Speech(rows, PackedAudio(folder / "audio.pcm"), crop_seconds=CROP, crop="random")
        plan = Plan(len(speech), options.batch, options.accumulation, seed=0)
        opening = time.perf_counter() - started
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def make(update: int) -> list[Batch]:
            return [
                speech.collate(positions, generator(0, "crop", update, j)).pinned(device)
                for j, positions in enumerate(plan.update(update))
            ]

        rates, memory = [], 0.0
        batches = prefetch(
            make, 1, options.updates + 1, ahead=options.ahead, readers=options.readers
        )
        next(batches)
        for _ in range(options.updates):
            started = time.perf_counter()
            seconds = sum(batch.seconds for batch in next(batches))
            rates.append(seconds / (time.perf_counter() - started))
            memory = max(memory, own_memory())
        batches.close()
    return {"utterances": len(rows), "opening": opening, "rates": rates, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--ahead", type=int, default=1, help="compute.prefetch of a recipe")
    parser.add_argument("--readers", type=int, default=1, help="compute.readers of a recipe")
    parser.add_argument("--folder", default=None, help="where the packed audio is made")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.hours[0])))
        return
    print("| hours | utterances | opened in, ms | seconds of audio a second | memory, MiB |")
    print("|---|---|---|---|---|", flush=True)
    for hours in options.hours:
        command = [sys.executable, __file__, "--one", "--hours", str(hours)]
        for option in ("updates", "batch", "accumulation", "ahead", "readers", "folder"):
            value = getattr(options, option)
            command += [] if value is None else [f"--{option}", str(value)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        cells = [f"{hours:g}", str(found["utterances"]), f"{1000 * found['opening']:.0f}"]
        cells += [spread(found["rates"], 0), f"{found['memory']:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    what = f"{options.updates} updates of {options.accumulation} x {options.batch} utterances"
    print(f"\n{what}, median (smallest to largest); {describe(torch.device('cpu'), ['torch'])}.")


if __name__ == "__main__":
    main()
