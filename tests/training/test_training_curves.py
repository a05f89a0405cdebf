"""TensorBoard's event files: what metrics.csv holds, however often a run was continued."""

from __future__ import annotations

import csv
import math
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_work, tiny_recipe

from reproduce.errors import InterruptedRun
from reproduce.records import RunFolder, RunRecord
from reproduce.stages.pretrain import pretrain
from reproduce.tasks.pretraining import PretrainTask
from reproduce.training import loop
from reproduce.training.curves import NOT_DRAWN, Curves
from reproduce.training.distributed import Ranks

pytest.importorskip("tensorboard")

ONE = Ranks(0, 1, torch.device("cpu"))


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) in the order of the file."""
    events = read(folder)
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:  # newer versions show scalars so
        if tag.startswith("_hparams_"):
            continue
        values = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)]
        found[tag] = values
    return found


def single(value: str) -> float:
    return float(struct.unpack("f", struct.pack("f", float(value)))[0])


def written(run: RunFolder, split: str) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.csv."""
    found: dict[str, list[tuple[int, float]]] = {}
    with run.metrics.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if row["split"] == split and name not in NOT_DRAWN and value:
                    found.setdefault(name, []).append((int(row["update"]), single(value)))
    return found


def session(folder: Path) -> tuple[dict[str, Any], int]:
    """Hyperparameters, and how the session ended (0: it hasn't)."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    data = read(folder).PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_start_info"])
    known = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    if "_hparams_/session_end_info" not in data:
        return known, 0
    end = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_end_info"])
    return known, end.session_end_info.status


def test_they_are_metrics_csv_after_an_interruption_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_work(tmp_path / "w")
    sets = [
        "seeds=[1]",
        "pretrain.updates=8",
        "pretrain.log_every=1",
        "pretrain.validation.every=2",
    ]
    recipe = tiny_recipe("corrected", work, *sets, "pretrain.checkpoint_every=100")
    run = work.run("pretrain", "icsl_4cb", 1)
    begin = PretrainTask.begin_update

    def stopped(self: PretrainTask, update: int, *more: Any) -> None:
        if update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, update, *more)

    monkeypatch.setattr(PretrainTask, "begin_update", stopped)
    with pytest.raises(InterruptedRun):
        pretrain(recipe, work, ONE, ["icsl_4cb"], [1])
    known, ended = session(run.events)
    assert (known["arm"], known["status"], ended) == ("icsl_4cb", "interrupted", 0)
    monkeypatch.setattr(PretrainTask, "begin_update", begin)

    # killed after more rows than its checkpoint knows: they are trained again, and there once
    metrics = run.metrics.read_text(encoding="utf-8")
    curves = Curves(run.events, RunRecord.read(run.record))
    last = dict(zip(metrics.splitlines()[0].split(","), metrics.splitlines()[-1].split(",")))
    curves.append(last | {"update": "4"})
    run.metrics.write_text(metrics + metrics.splitlines()[-1] + "\n", encoding="utf-8")
    pretrain(recipe, work, ONE, ["icsl_4cb"], [1])

    for split, updates in (("train", range(1, 9)), ("valid", None)):
        found, expected = points(run.events / split), written(run, split)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert len(found[name]) == len(values), name
            for (step, value), (update, number) in zip(found[name], values, strict=True):
                assert step == update
                assert value == number or (math.isnan(value) and math.isnan(number))
        if updates is not None:
            assert [step for step, _ in found["contrastive_loss"]] == list(updates)
    known, ended = session(run.events)
    record = RunRecord.read(run.record)
    assert known["pretrain.quantizer.codebooks"] == 4
    assert known["pretrain.optimizer.betas"] == "[0.9, 0.98]"
    assert (known["seed"], known["outcome"], known["status"]) == (1, record.outcome, "finished")
    assert ended == (1 if record.outcome == "ok" else 2)
    assert len(list(run.events.rglob("*tfevents*"))) == 3


def test_without_tensorboard_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "curves_available", lambda: False)
    run = RunFolder(tmp_path, "pretrain", "a", 1)
    learner = loop.Learner(run, RunRecord("a", 1), [], None, None)  # type: ignore[arg-type]
    learner.metrics.restart()
    learner.metrics.append({"update": 1, "split": "train"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    record = RunRecord("a", 1, started="2026-01-02T03:04:05+00:00")
    rows = [
        {"update": str(n), "split": split, "ctc_loss": "1.5", "wer": "", "wall_seconds": str(n)}
        for n in (1, 2)
        for split in ("train", "valid")
    ]
    with (tmp_path / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    grown, anew = Curves(tmp_path / "grown", record), Curves(tmp_path / "anew", record)
    for row in rows:
        grown.append(row)
    anew.restart(tmp_path / "metrics.csv")
    files = sorted(path.relative_to(grown.folder) for path in grown.folder.rglob("*tfevents*"))
    assert len(files) == 2
    for file in files:
        assert (grown.folder / file).read_bytes() == (anew.folder / file).read_bytes()
    events = read(grown.folder / "train")
    assert events.FirstEventTimestamp() == pytest.approx(1767323045.0)  # its start, UTC
    assert points(grown.folder / "train") == {"ctc_loss": [(1, 1.5), (2, 1.5)]}
