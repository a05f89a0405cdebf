"""Whether training converges alike in bf16 or TF32 as in float32: the same run in each.

    python benchmarks/precision.py --recipe smoke
    python benchmarks/precision.py --recipe corrected+mini --arm icsl_8cb --set pretrain.updates=400

Prepares the recipe's data once, trains one arm and seed in each precision, and prints validation
losses side by side. Masks, negatives, Gumbel noise and dropout are those of (seed, update), so the
runs differ by rounding, and on CUDA by what dropout draws for each type.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "reproduce", *arguments], check=True)


def validation(folder: Path) -> dict[int, dict[str, float]]:
    """update -> contrastive and chance loss and wall seconds."""
    (found,) = folder.glob("pretrain/*/seed-*/metrics.csv")
    with found.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "valid"]
    names = ("contrastive_loss", "chance_loss", "wall_seconds")
    return {int(row["update"]): {name: float(row[name]) for name in names} for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="smoke")
    parser.add_argument("--arm", default="no_icsl_2cb")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        keys = [part for value in options.set for part in ("--set", value)]
        curves = {}
        for precision in options.precisions:
            folder = work / precision
            folder.mkdir(exist_ok=True)
            data = folder / "data"
            if precision != options.precisions[0] and not data.exists():
                data.symlink_to((work / options.precisions[0] / "data").resolve())
            own = [options.recipe, "--work", str(folder), "--set", f"seeds=[{options.seed}]", *keys]
            if precision == options.precisions[0]:
                run("prepare", *own)
            own += ["--set", f"compute.precision={precision}"]
            run("pretrain", *own, "--arm", options.arm, "--seed", options.seed)
            curves[precision] = validation(folder)
    first = curves[options.precisions[0]]
    columns = ["update", "chance", *options.precisions]
    columns += [f"{name} - {options.precisions[0]}" for name in options.precisions[1:]]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for update, values in first.items():
        losses = [curves[name][update]["contrastive_loss"] for name in options.precisions]
        cells = [str(update), f"{values['chance_loss']:.4f}", *(f"{loss:.4f}" for loss in losses)]
        cells += [f"{loss - losses[0]:+.4f}" for loss in losses[1:]]
        print("| " + " | ".join(cells) + " |")
    last = max(first)
    times = [f"{name} {curve[last]['wall_seconds']:.0f} s" for name, curve in curves.items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\n{options.recipe}, {options.arm}, seed {options.seed}; {', '.join(times)}.", end=" ")
    print(describe(device, ["torch"]) + ".")


if __name__ == "__main__":
    main()
