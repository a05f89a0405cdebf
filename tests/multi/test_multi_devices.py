"""Both stages through the command line on each kind of device, in each precision.

On the CPU these show that the tests themselves hold; on a CUDA device they are the proof.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    assert_rows_close,
    copy,
    finish,
    patience,
    rows,
    spec,
    start,
    tiny_recipe,
    train,
)
from tiny_runs import command as command_line

from reproduce.records import RunRecord, Stage, WorkFolder

ROOT = Path(__file__).parents[2]


def gpus(count: int) -> list[pytest.MarkDecorator]:
    lacking = not torch.cuda.is_available() or torch.cuda.device_count() < count
    return [pytest.mark.gpu, pytest.mark.skipif(lacking, reason=f"needs {count} CUDA device(s)")]


CUDA = pytest.param("cuda", marks=gpus(1))
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
EXACT = ("--set", "model.dropout=0", "--set", "model.attention_dropout=0")
EXACT += ("--set", "model.activation_dropout=0", "--set", "model.projection_dropout=0")
EXACT += ("--set", "model.layer_drop=0")


@DEVICES
@pytest.mark.parametrize("setting", ["precision=float32", "precision=bf16", "compile=true"])
def test_both_stages(base: WorkFolder, tmp_path: Path, device: str, setting: str) -> None:
    if setting == "compile=true" and device == "cpu":
        pytest.skip("the compiler itself is torch's; graphs are tested with the encoder")
    work = copy(base, tmp_path / "work")
    options = ["--device", device, "--set", f"compute.{setting}"]
    train("pretrain", "corrected", work, "--arm", "icsl_8cb", *options)
    train("finetune", "as-run", work, "--arm", "rvq_1", "--arm", "rvq_16", *options)
    train("finetune", "corrected", copy(base, tmp_path / "other"), "--arm", "rvq_2", *options)
    for run in (work.run("pretrain", "icsl_8cb", 1), work.run("finetune", "rvq_16", 1)):
        record = RunRecord.read(run.record)
        assert record.status == "finished"
        assert record.precision == ("bf16" if "bf16" in setting else "float32")
        loss = "contrastive_loss" if run.stage == "pretrain" else "ctc_loss"
        assert math.isfinite(float(rows(run)[-1][loss]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("stage", "protocol", "arms"),
    [
        ("pretrain", "corrected", ["no_icsl_4cb"]),
        ("finetune", "corrected", ["no_rvq"]),
        ("finetune", "as-written", ["no_rvq", "rvq_1", "rvq_4"]),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(
    base: WorkFolder, tmp_path: Path, stage: Stage, protocol: str, arms: list[str]
) -> None:
    """Without dropout and Gumbel noise, which each device draws by itself, in its first updates."""
    options = [word for arm in arms for word in ("--arm", arm)]
    options += [*EXACT, "--set", "pretrain.updates=3", "--set", "finetune.updates=3"]
    found = {}
    for device in ("cpu", "cuda"):
        work = copy(base, tmp_path / device)
        train(stage, protocol, work, *options, "--device", device)
        found[device] = [rows(work.run(stage, arm, 1), "wall_seconds") for arm in arms]
    tolerance = 0.05 if stage == "pretrain" else 1e-3  # Gumbel noise has each device's own stream
    for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert_rows_close(gpu[:1], cpu[:1], tolerance)


@DEVICES
def test_stopped_and_gone_on_with(base: WorkFolder, tmp_path: Path, device: str) -> None:
    work, arm = copy(base, tmp_path / "work"), "icsl_2cb"
    whole = copy(base, tmp_path / "whole")
    options = ["--arm", arm, "--device", device]
    train("pretrain", "corrected", whole, *options)
    run, log = work.run("pretrain", arm, 1), work.root / "first.log"
    arguments = ["pretrain", spec("corrected", work), "--work", str(work.root), *options]
    process = start(command_line, arguments, log=log)
    with patience() as wait:
        while not (run.metrics.exists() and rows(run)):
            wait()
    process.terminate()
    finish([process], log, 143)
    train("pretrain", "corrected", work, *options)
    expected = rows(whole.run("pretrain", arm, 1))
    assert_rows_close(rows(run), expected, 1e-9 if device == "cpu" else 0.05)


@DEVICES
def test_two_processes_share_a_work_folder(base: WorkFolder, tmp_path: Path, device: str) -> None:
    work, log = copy(base, tmp_path / "work"), tmp_path / "grid.log"
    options = ["--arm", "no_icsl_2cb", "--arm", "icsl_2cb", "--arm", "icsl_4cb"]
    options += ["--set", "seeds=[1,2]", "--set", "pretrain.updates=2", "--device", device]
    arguments = ["pretrain", spec("corrected", work), "--work", str(work.root), *options]
    processes = [start(command_line, arguments, log=log.with_suffix(f".{n}")) for n in range(2)]
    finish(processes, log)
    arms = ("no_icsl_2cb", "icsl_2cb", "icsl_4cb")
    runs = [work.run("pretrain", arm, seed) for arm in arms for seed in (1, 2)]
    assert {RunRecord.read(run.record).status for run in runs} == {"finished"}
    said = log.with_suffix(".0").read_text() + log.with_suffix(".1").read_text()
    for run in runs:
        assert said.count(f"{run.name}: finished,") <= 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpus(2))])
def test_two_ranks(base: WorkFolder, tmp_path: Path, device: str) -> None:
    """One run on two devices; NCCL, on GPUs."""
    work = copy(base, tmp_path / "work")
    train("pretrain", "corrected", work, "--arm", "icsl_2cb", "--device", device, world=2)
    assert RunRecord.read(work.run("pretrain", "icsl_2cb", 1).record).world_size == 2


@DEVICES
def test_more_ranks_than_gpus(
    base: WorkFolder, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reproduce.errors import UsageError
    from reproduce.training import distributed

    count = torch.cuda.device_count() if device == "cuda" else 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(count))
    monkeypatch.setenv("WORLD_SIZE", str(count + 1))
    with pytest.raises(UsageError, match=f"no GPU of its own: there are {count}"):
        distributed.start("auto")


@DEVICES
def test_the_benchmark_runs(device: str) -> None:
    command = [sys.executable, "benchmarks/pretrain_step.py", "--device", device, "--size", "tiny"]
    command += ["--seconds", "1", "--pairs", "1", "--codebooks", "2", "--mask-probability", "0.65"]
    command += ["--no-memory"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| 2 | 0.65 |") == 1


def test_the_recipe_of_these_runs_pins_the_cpu(base: WorkFolder) -> None:
    """So that the other tests of processes stay there on a machine with a GPU."""
    assert tiny_recipe("corrected", base).compute.device == "cpu"
