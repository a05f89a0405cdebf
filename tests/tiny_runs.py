"""Runs small enough to be started, killed and repeated many times within a test.

Processes are forked from a server that has imported everything once, so that a start takes no
seconds. All compute with one thread: bit-for-bit claims hold for the same number of threads.
"""

from __future__ import annotations

import csv
import errno
import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas  # noqa: F401  (imported late by what is tested: the server shall have it)
import pyarrow  # noqa: F401
import torch
import torch._dynamo
from tqdm import tqdm

import reproduce.cli
import reproduce.grid.claiming
import reproduce.tasks.bank
import reproduce.tasks.pretraining
from reproduce.compat import import_torchaudio
from reproduce.data.audio import Decoded
from reproduce.data.batches import Batch, Speech
from reproduce.data.corpora import AudioSource, Utterance
from reproduce.data.manifest import write_manifest
from reproduce.grid.workers import rank_envs
from reproduce.recipe import load_recipe
from reproduce.recipe.schema import Recipe
from reproduce.records import RunFolder, RunRecord, Stage, WorkFolder
from reproduce.training.checkpoint import checkpoint_updates, load_checkpoint

import_torchaudio()

SIZE = """
seeds: [1]
data: {corpus: synthetic, subset: all, vocabulary: corpus}
model:
  conv_channels: [16, 16, 16, 16, 16, 16, 16]
  width: 32
  layers: 2
  heads: 2
  feed_forward: 48
  position_kernel: 8
  position_groups: 2
pretrain:
  updates: 10
  batch_size: 2
  accumulation: 4
  min_seconds: 0.1
  crop_seconds: 1.0
  optimizer: {learning_rate: 1.0e-3}
  quantizer: {entries: 8, codevector_dim: 32, projection_dim: 16}
  contrastive: {negatives: 10}
  validation: {every: 4, batch_size: 3}
  log_every: 3
  checkpoint_every: 2
  gradient_share_every: 1
finetune:
  encoder: no_icsl_2cb/seed-{seed}
  updates: 10
  batch_size: 2
  accumulation: 4
  optimizer: {learning_rate: 1.0e-3}
  rvq: {codes: 8}
  masking: {channel_length: 8}
  validation: {every: 4, batch_size: 3}
  log_every: 3
  checkpoint_every: 2
compute: {device: cpu, threads: 1}
"""


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
"""Audit events of changes in a file system, beside opening to write."""


@dataclass(frozen=True)
class Noise(AudioSource):
    """Noise that a seed makes, with a pitch so that there is something to learn."""

    seed: int
    samples: int

    def load(self) -> Decoded:
        rng = np.random.default_rng(self.seed)
        tone = np.sin(np.arange(self.samples) * rng.uniform(0.05, 0.5))
        sound = 0.2 * tone + 0.05 * rng.standard_normal(self.samples)
        return Decoded(sound.astype(np.float32), 16_000, f"{self.seed:064x}")


def make_work(root: Path, *, train: int = 21, valid: int = 5) -> WorkFolder:
    """A work folder with prepared data: utterances of 0.6 to 1.4 s, a short text each."""
    rng = np.random.default_rng(5)
    utterances = []
    for number in range(train + valid):
        text = "".join(rng.choice(list("ABCD "), rng.integers(3, 9))).strip() or "A"
        utterances.append(
            Utterance(
                id=f"u{number:02}",
                split="train" if number < train else "valid",
                speaker="s1" if number < train else "s2",
                text=text,
                source=f"noise:{number}",
                audio=Noise(number, int(rng.integers(9_600, 22_400))),
            )
        )
    work = WorkFolder(root)
    write_manifest(utterances, work.data, corpus="synthetic", jobs=1)
    (root / "size.yaml").write_text(SIZE, encoding="utf-8")
    return work


def copy(base: WorkFolder, folder: Path) -> WorkFolder:
    """Another work folder with the same in it."""
    shutil.copytree(base.root, folder)
    return WorkFolder(folder)


def spec(protocol: str, work: WorkFolder) -> str:
    """What the command line takes for a protocol in this size."""
    return f"{protocol}+{work.root / 'size.yaml'}"


def tiny_recipe(protocol: str, work: WorkFolder, *sets: str) -> Recipe:
    return load_recipe(spec(protocol, work), sets)


# -------------------------------------------------------------------------------------- processes


@functools.cache
def _server() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tiny_runs"])
    return context


def warm_up() -> None:
    """Let the server begin to import while other tests run."""
    _server()
    forkserver.ensure_running()


def start(
    target: Callable[..., object], *arguments: Any, log: Path, env: Mapping[str, str] | None = None
) -> BaseProcess:
    """Run a function of an importable module in its own process; its output goes to ``log``."""
    process: BaseProcess = _server().Process(target=_run, args=(target, arguments, log, env or {}))
    process.start()
    return process


def _run(
    target: Callable[..., object], arguments: Sequence[Any], log: Path, env: Mapping[str, str]
) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # not a semaphore, which a killed process leaves behind
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.dump_traceback_later(90, exit=True)
    target(*arguments)


def start_ranks(world: int, target: Callable[..., object], *arguments: Any, log: Path) -> list[Any]:
    """As many processes as torchrun would start; ``log`` gets the rank's number as suffix."""
    return [
        start(target, *arguments, log=log.with_suffix(f".{rank}"), env=env)
        for rank, env in enumerate(rank_envs(world))
    ]


def finish(processes: Sequence[BaseProcess], log: Path, expected: int = 0) -> None:
    """Wait for processes and check their exit codes."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    if codes != [expected] * len(codes):
        logs = sorted(log.parent.glob(f"{log.stem}.*"))
        text = "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs)
        raise AssertionError(f"exit codes {codes}, expected {expected}\n{text}")


def command(arguments: Sequence[str]) -> None:
    """The command line."""
    reproduce.cli.main(["--debug", *arguments])


def command_keeping_checkpoints(arguments: Sequence[str]) -> None:
    """Those of finished runs stay, to look at the optimizer."""
    keep_checkpoints()
    command(arguments)


def keep_checkpoints() -> None:
    kept = SimpleNamespace(rmtree=lambda path, ignore_errors: None)
    reproduce.training.loop.shutil = kept  # type: ignore[attr-defined]
    reproduce.grid.claiming.shutil = kept  # type: ignore[attr-defined]


def command_killed(arguments: Sequence[str], call: int) -> None:
    """Killed as by SIGKILL just before its n-th change of a file in the work folder."""
    root = arguments[arguments.index("--work") + 1]
    left = call

    def hook(event: str, about: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in CHANGES or (event == "open" and "w" in str(about[1]))
        if changes and str(about[0]).startswith(root):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    command_keeping_checkpoints(arguments)


def command_on_a_full_disk(arguments: Sequence[str], name: str, call: int) -> None:
    """No space is left from the n-th time on that a file or folder so called is made.

    What is written by a handle that is open already still goes through; the tests of whatever
    writes have that.
    """
    root, left = arguments[arguments.index("--work") + 1], call

    def hook(event: str, about: tuple[Any, ...]) -> None:
        nonlocal left
        made = event == "os.mkdir"
        made |= event == "open" and isinstance(about[1], str) and about[1][0] in "wax"
        if made and str(about[0]).startswith(root):
            left -= name in str(about[0])
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(about[0]))

    sys.addaudithook(hook)
    keep_checkpoints()
    reproduce.cli.main(arguments)


def command_killed_after_a_checkpoint(arguments: Sequence[str], arm: str, update: int) -> None:
    """Killed as by SIGKILL when this arm's checkpoint of an update has been written."""
    checkpoint: Any = reproduce.training.checkpoint
    save = checkpoint.save_checkpoint

    def save_and_die(folder: Path, position: int, state: dict[str, Any]) -> Path:
        path: Path = save(folder, position, state)
        if position == update and arm in folder.parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    checkpoint.save_checkpoint = save_and_die
    command_keeping_checkpoints(arguments)


def command_in_float64(arguments: Sequence[str]) -> None:
    """Models and audio in float64, where rounding turns no choice of a code."""
    collate = Speech.collate

    def collate_double(self: Speech, *positions: Any) -> Batch:
        batch = collate(self, *positions)
        return replace(batch, waveform=batch.waveform.double())

    def double(make: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        return lambda *args, **kwargs: make(*args, **kwargs).double()

    Speech.collate = collate_double  # type: ignore[method-assign]
    pretraining: Any = reproduce.tasks.pretraining
    finetuning: Any = reproduce.tasks.bank
    pretraining.build_model = double(pretraining.build_model)
    finetuning.load_encoder = double(finetuning.load_encoder)
    finetuning.HeadBank = double(finetuning.HeadBank)
    command(arguments)


def command_without_dropout(arguments: Sequence[str]) -> None:
    """In float64, the encoder that is fine-tuned without anything random in train mode."""
    load_encoder = reproduce.tasks.bank.load_encoder

    def still(*args: Any) -> Any:
        encoder = load_encoder(*args)
        off = {name: 0.0 for name in vars(encoder.config) if "drop" in name}
        encoder.config = replace(encoder.config, **off)
        return encoder

    reproduce.tasks.bank.load_encoder = still
    command_in_float64(arguments)


def train(
    stage: Stage,
    protocol: str,
    work: WorkFolder,
    *options: str,
    world: int = 1,
    target: Callable[[Sequence[str]], None] = command,
    expected: int = 0,
) -> None:
    """``w2vrep STAGE`` on so many processes, to its end."""
    log = work.root / f"{stage}.log"
    arguments = [stage, spec(protocol, work), "--work", str(work.root), *options]
    finish(start_ranks(world, target, arguments, log=log), log, expected)


@contextmanager
def patience(seconds: float = 60.0) -> Iterator[Callable[[], None]]:
    """Yields a function to call while waiting for something."""
    last = time.monotonic() + seconds

    def wait() -> None:
        assert time.monotonic() < last, "it didn't happen"
        time.sleep(0.005)

    yield wait


# ---------------------------------------------------------------------------------------- results


def rows(run: RunFolder, *without: str) -> list[dict[str, str]]:
    """metrics.csv as text, but for some columns."""
    with open(run.metrics, encoding="utf-8", newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in without}
            for row in csv.DictReader(file)
        ]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    """Of the finished model."""
    from safetensors.torch import load_file

    return load_file(run.model / "model.safetensors")


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested containers as one dict."""
    if isinstance(state, dict):
        items: Any = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {prefix: state}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}/{key}")
    return found


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, tensors or plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Rows, weights, optimizer, codebooks and hypotheses, to the last bit."""
    assert rows(found, "wall_seconds") == rows(expected, "wall_seconds")
    walls = [float(row["wall_seconds"]) for row in rows(found)]
    assert walls == sorted(walls)
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if not same(a[name], b[name])] == []

    update = RunRecord.read(expected.record).updates
    assert checkpoint_updates(found.checkpoints)[0] == update
    state, wanted = (flat(load_checkpoint(run.checkpoints, update)) for run in (found, expected))
    assert state.keys() == wanted.keys()
    differ = [name for name in state if not same(state[name], wanted[name])]
    # clocks; the size has the seconds' digits
    assert set(differ) <= {"/wall_seconds", "/validation_seconds", "/metrics_size"}

    ours, theirs = RunRecord.read(found.record), RunRecord.read(expected.record)
    assert (ours.status, ours.outcome, ours.final) == ("finished", theirs.outcome, theirs.final)
    for name in ("codes.npz", "hypotheses.csv"):
        if (expected.root / name).exists():
            assert (found.root / name).read_bytes() == (expected.root / name).read_bytes()
    left = [p.name for p in found.root.rglob("*.tmp")]
    assert left == []


def assert_rows_close(
    found: Sequence[Mapping[str, str]], expected: Sequence[Mapping[str, str]], tolerance: float
) -> None:
    """Rows with the same updates and columns, numbers within a relative tolerance (or of 1)."""
    assert [(r["update"], r["split"]) for r in found] == [
        (r["update"], r["split"]) for r in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if name in ("split", "wall_seconds"):
                continue
            where = f"{name} at {theirs['split']} {theirs['update']}"
            assert (ours[name] == "") == (value == ""), where
            if value:
                difference = abs(float(ours[name]) - float(value))
                assert difference <= tolerance * max(1.0, abs(float(value))), where
