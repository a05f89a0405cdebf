"""Made-up work folders of which the truth is known."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from reproduce.position import generator
from reproduce.records import METRIC_COLUMNS, Outcome, RunRecord, Stage, Status, WorkFolder

CHANCE = 4.6149
PRETRAIN_ARMS = [f"{p}icsl_{g}cb" for g in (2, 4, 8, 16) for p in ("no_", "")]
LEVELS = {"no_rvq": 0, "rvq_1": 1, "rvq_2": 2, "rvq_4": 4, "rvq_8": 8, "rvq_16": 16}


def write_recipe(
    root: Path,
    name: str = "made-up",
    seeds: Iterable[int] = (1, 2, 3, 4, 5),
    pretrain: Iterable[str] = PRETRAIN_ARMS,
    finetune: Iterable[str] = tuple(LEVELS),
    **more: Any,
) -> None:
    recipe = {
        "name": name,
        "seeds": list(seeds),
        "pretrain": {
            "arms": {arm: {} for arm in pretrain},
            "optimizer": {"learning_rate": 1e-4},
            "updates": 700,
        },
        "finetune": {"arms": {arm: {"rvq.levels": LEVELS[arm]} for arm in finetune}},
        **more,
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_codes(
    run: Path, *, rows: int, entries: int = 320, used: int | None = None, shift: float = 0.0
) -> None:
    """``codes.npz`` of ``rows`` codebooks or levels that use ``used`` of their entries alike.

    Pairs of codebooks have similarity 0.75 before and 0.75 + ``shift`` after training, mutual
    information 0.4 over a baseline of 0.3; level k leaves a residual of 1/k.
    """
    counts = np.zeros((rows, entries), np.int64)
    counts[:, : used or entries] = 10
    kinds: dict[str, Any] = {"code_counts": counts}
    if run.parent.parent.name == "pretrain":
        off = np.where(np.eye(rows, dtype=bool), np.nan, 1.0)
        kinds |= {
            "codebooks_first": np.zeros((rows, entries, 256 // rows), np.float32),
            "codebooks_last": np.ones((rows, entries, 256 // rows), np.float32),
            "similarity_first": np.full((rows, rows), 0.75),
            "similarity_last": np.full((rows, rows), 0.75 + shift),
            "nmi": 0.4 * off,
            "nmi_baseline": 0.3 * off,
        }
    else:
        kinds |= {
            "codebooks": np.zeros((rows, entries, 8), np.float32),
            "mse": 1 / np.arange(1, rows + 1),
            "perplexity": np.full(rows, float(used or entries)),
            "dead_codes": np.full(rows, entries - (used or entries)),
        }
    np.savez_compressed(run / "codes.npz", **kinds)


def write_run(
    root: Path,
    stage: Stage,
    arm: str,
    seed: int,
    loss: float,
    *,
    points: int = 40,
    steepness: float = 4.0,
    train_loss: float | None = None,
    status: Status = "finished",
    outcome: Outcome = "ok",
    final: bool = True,
    columns: Mapping[str, float] | None = None,
    **record: Any,
) -> Path:
    """A run that ends at ``loss`` on validation (and at ``train_loss`` in training)."""
    folder = WorkFolder(root).run(stage, arm, seed)
    folder.root.mkdir(parents=True)
    rng = generator(seed, "made-up", stage, arm)
    updates = np.arange(1, points + 1) * 10
    progress = np.exp(-steepness * updates / updates[-1])
    start, name = (0.05, "contrastive_loss") if stage == "pretrain" else (10.0, "ctc_loss")
    rows: list[dict[str, Any]] = []
    finals: dict[str, dict[str, float | None]] = {}
    for split, end in (("train", loss if train_loss is None else train_loss), ("valid", loss)):
        noise = rng.normal(0, 0.02 * start, points)
        noise[-1] = 0
        values = end + start * (progress - progress[-1]) + noise * progress
        every = 1 if split == "train" else 4
        for k in range(every - 1, points, every):
            done = (k + 1) / points
            row: dict[str, Any] = {
                "update": updates[k], "split": split, name: values[k], "grad_norm": 0.5,
                "audio_seconds": 640.0 * (k + 1), "wall_seconds": 3.0 * (k + 1),
            }  # fmt: skip
            if split == "train":
                row["learning_rate"] = 1e-4 * min(1.0, 5 * done)
            if stage == "pretrain":
                row |= {
                    "chance_loss": CHANCE, "mask_fraction": 0.05, "negatives_kept": 99.5,
                    "perplexity": 100 + 200 * done, "diversity_loss": 0.5,
                }  # fmt: skip
                if "no_icsl" not in arm and split == "train":
                    row |= {"icsl": 0.7515, "icsl_effective_weight": 3e-4,
                            "icsl_gradient_share": 0.002}  # fmt: skip
                if split == "valid":
                    row["code_nmi"] = 0.3 - 0.1 * done
            elif split == "valid":
                row |= {"wer": 0.99, "cer": 0.9, "blank_rate": 0.97, "rvq_mse": 0.1,
                        "rvq_perplexity": 40.0, "rvq_dead_codes": 60.0}  # fmt: skip
            row |= columns or {}
            rows.append(row)
            finals[split] = {key: float(v) for key, v in row.items() if key not in ("split",)}
    rows.sort(key=lambda row: row["update"])
    with folder.metrics.open("w", newline="") as file:
        writer = csv.DictWriter(file, METRIC_COLUMNS[stage], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{v:.9g}" if isinstance(v, float) else v for key, v in row.items()}
            for row in rows
        )
    RunRecord(
        arm, seed, status=status, outcome=outcome, final=finals if final else {},
        updates=int(updates[-1]), updates_planned=int(updates[-1]),
        **{"git": "0123abc", "versions": {"torch": "2.11"}, "device": "cpu",
           "recipe_sha256": "a" * 64, "manifest_sha256": "b" * 64, "wall_seconds": 120.0,
           "started": "2025-01-01T00:00:00Z", "ended": "2025-01-01T00:02:00Z", **record},
    ).write(folder.record)  # fmt: skip
    return folder.root
