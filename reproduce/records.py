"""What crosses the borders between stages: folder layout, metric columns, run.json. No torch.

The stages write through this module and the report reads through it, so a name lives here once.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["pretrain", "finetune"]
Status = Literal["running", "interrupted", "failed", "finished"]
Outcome = Literal["ok", "diverged", "at_chance", "collapsed", "all_blank"]

PRETRAIN_COLUMNS = (
    "update", "split", "contrastive_loss", "chance_loss", "speech_loss", "speech_chance",
    "diversity_loss", "icsl", "icsl_effective_weight", "icsl_gradient_share", "code_nmi",
    "perplexity", "mask_fraction", "negatives_kept", "learning_rate", "gumbel_temperature",
    "grad_norm", "audio_seconds", "wall_seconds",
)  # fmt: skip
FINETUNE_COLUMNS = (
    "update", "split", "ctc_loss", "wer", "cer", "blank_rate", "zeroed", "learning_rate",
    "grad_norm", "rvq_mse", "rvq_perplexity", "rvq_dead_codes", "audio_seconds", "wall_seconds",
)  # fmt: skip
METRIC_COLUMNS: dict[Stage, tuple[str, ...]] = {
    "pretrain": PRETRAIN_COLUMNS,
    "finetune": FINETUNE_COLUMNS,
}
MANIFEST_COLUMNS = (
    "id", "corpus", "split", "subset", "speaker", "seconds", "samples", "offset", "text", "source",
    "sha256",
)  # fmt: skip
HYPOTHESES_COLUMNS = ("id", "reference", "hypothesis", "errors")

AT_CHANCE_MARGIN = 0.02
"""nats: a run whose last validation loss is this near its chance loss is ``at_chance``."""

MODEL_FILES = ("config.json", "model.safetensors")
"""What every finished ``model/`` has, in Hugging Face's layout."""

SUBSETS = ("10min", "1h", "10h", "all")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, ``STAGE/ARM/seed-N``."""

    root: Path
    stage: Stage
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.arm}/seed-{self.seed}"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def events(self) -> Path:
        """TensorBoard's event files, where that is installed."""
        return self.root / "events"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def codes(self) -> Path:
        return self.root / "codes.npz"

    @property
    def hypotheses(self) -> Path:
        return self.root / "hypotheses.csv"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"


@dataclass(frozen=True)
class WorkFolder:
    """``runs/<name>/``: everything one recipe leaves behind."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def manifest(self) -> Path:
        return self.data / "manifest.csv"

    @property
    def columns(self) -> Path:
        """The manifest once more, as columns to be mapped into memory."""
        return self.data / "manifest.arrow"

    @property
    def audio(self) -> Path:
        """Packed audio; above 4 GiB it lies in ``audio-0000.pcm``, ... instead."""
        return self.data / "audio.pcm"

    @property
    def summary(self) -> Path:
        return self.data / "summary.json"

    @property
    def features(self) -> Path:
        """Features of frozen encoders, a file a selection of utterances (``KEY.DTYPE``).

        Made by fine-tuning where they are the same in every epoch, and used by all arms and seeds.
        May be deleted when nothing trains: they are made anew if needed.
        """
        return self.root / "features"

    @property
    def logs(self) -> Path:
        """What the workers of ``--jobs`` and ``--cluster`` say, a file each."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def run(self, stage: Stage, arm: str, seed: int) -> RunFolder:
        return RunFolder(self.root / stage / arm / f"seed-{seed}", stage, arm, seed)

    def runs(self, stage: Stage) -> Iterator[RunFolder]:
        """Every run folder of a stage that exists, finished or not, in name order."""
        for arm in sorted(p for p in (self.root / stage).glob("*") if p.is_dir()):
            found = []
            for folder in arm.glob("seed-*"):
                if (match := re.fullmatch(r"seed-(\d+)", folder.name)) and folder.is_dir():
                    found.append((int(match[1]), folder))
            for seed, folder in sorted(found):
                yield RunFolder(folder, stage, arm.name, seed)


@dataclass
class RunRecord:
    """``run.json``.

    Attributes:
        final: split -> (metrics column -> value).
        bank: arms that are trained together from one pass of the encoder, this one's included;
            empty: alone. ``wall_seconds`` of each is then the whole bank's: count it once.
        wall_seconds: active time over all continuations, that of encoding kept features included
            in the run or bank that did it.
        validation_seconds: of these, what validation took (0 in files of earlier versions).
    """

    arm: str
    seed: int
    status: Status = "running"
    outcome: Outcome = "ok"
    final: dict[str, dict[str, float | None]] = field(default_factory=dict)
    recipe_sha256: str = ""
    manifest_sha256: str = ""
    git: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    precision: str = "float32"
    world_size: int = 1
    bank: list[str] = field(default_factory=list)
    started: str = ""
    ended: str | None = None
    wall_seconds: float = 0.0
    validation_seconds: float = 0.0
    updates: int = 0
    updates_planned: int = 0
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write whole or not at all."""
        write_text(path, json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read ``run.json``; keys of later versions are ignored.

        Raises:
            ValueError: the file isn't JSON or lacks ``arm`` or ``seed``.
        """
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or not {"arm", "seed"} <= raw.keys():
            raise ValueError(f"{path}: not a run record")
        return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all (temporary name, flush to disk, rename)."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write new files and folders in, which then take their places in `folder`: all of
    them, or none where anything goes wrong before."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGE}*"):  # of a killed process
        if left.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
    try:
        new, old = stage / "new", stage / "old"
        new.mkdir()
        old.mkdir()
        yield new
        for path in sorted(new.iterdir()):
            target = folder / path.name
            if target.is_dir():
                os.replace(target, old / path.name)
            os.replace(path, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


_STAGE = ".being-written-"


def _plain(value: Any) -> Any:
    """JSON knows no NaN or infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
