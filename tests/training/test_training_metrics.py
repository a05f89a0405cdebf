"""metrics.csv without a gap or a repeat; sums that become means once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.errors import DataError
from reproduce.records import RunRecord
from reproduce.training.checkpoint import load_checkpoint, save_checkpoint
from reproduce.training.metrics import Means, MetricsFile, format_value

COLUMNS = ("update", "split", "loss", "wer")


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_rows_are_appended_under_the_header(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "run" / "metrics.csv", COLUMNS)
    metrics.restart()
    metrics.append({"update": 1, "split": "train", "loss": 0.1})
    metrics.append({"update": 1, "split": "valid", "loss": float("nan"), "wer": None})
    assert lines(metrics.path) == ["update,split,loss,wer", "1,train,0.1,", "1,valid,nan,"]
    assert metrics.size == metrics.path.stat().st_size


def test_restart_drops_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv", COLUMNS)
    metrics.restart()
    metrics.append({"update": 1, "split": "train", "loss": 0.5})
    size, kept = metrics.size, metrics.path.read_bytes()
    metrics.append({"update": 2, "split": "train", "loss": 0.4})
    with open(metrics.path, "a") as file:
        file.write("3,tra")  # killed in the middle of a row

    again = MetricsFile(metrics.path, COLUMNS)
    again.restart(size)
    assert metrics.path.read_bytes() == kept
    again.append({"update": 2, "split": "train", "loss": 0.4})
    assert lines(metrics.path)[1:] == ["1,train,0.5,", "2,train,0.4,"]

    MetricsFile(metrics.path, COLUMNS).restart()
    assert lines(metrics.path) == ["update,split,loss,wer"]


def test_missing_rows_are_told(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv", COLUMNS)
    metrics.restart()
    with pytest.raises(DataError, match="rows are missing"):
        metrics.restart(metrics.size + 1)
    metrics.path.unlink()
    with pytest.raises(DataError, match="rows are missing"):
        metrics.restart(5)


def test_a_column_that_does_not_exist(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv", COLUMNS)
    metrics.restart()
    with pytest.raises(KeyError, match="los"):
        metrics.append({"update": 1, "los": 0.1})
    assert len(lines(metrics.path)) == 1


def test_nine_digits_tell_float32_values_apart() -> None:
    rng = np.random.default_rng(0)
    for value in rng.standard_normal(2000).astype(np.float32):
        assert np.float32(float(format_value(float(value)))) == value
    assert format_value(3) == "3"
    assert format_value(float("inf")) == "inf"


def test_means_are_of_everything_counted() -> None:
    means = Means()
    means.add("loss", 6.0, 2.0)
    means.add("loss", 4.0, 3.0)
    means.add("never", 0.0, 0.0)
    assert means.means() == {"loss": 2.0}
    assert means.sums["never"] == 0.0
    means.clear()
    assert means.means() == {}


def test_a_window_in_a_checkpoint_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """Sums are float64 and come back so, wherever the window is cut."""
    rng = random.Random(0)
    parts = [(rng.gauss(0, 1e3), float(rng.randrange(1, 500))) for _ in range(40)]
    whole = Means()
    for total, count in parts:
        whole.add("loss", total, count)
    for cut in (1, 17, 39):
        first = Means()
        for total, count in parts[:cut]:
            first.add("loss", total, count)
        save_checkpoint(tmp_path, cut, {"means": first.state()})
        second = Means()
        second.load(load_checkpoint(tmp_path, cut)["means"])
        for total, count in parts[cut:]:
            second.add("loss", total, count)
        assert second.means() == whole.means()


def test_run_json_keeps_float64_exactly(tmp_path: Path) -> None:
    value = float(torch.tensor(1 / 3, dtype=torch.float64)) * 1e-7
    record = RunRecord("arm", 1, final={"train": {"loss": value, "wer": float("nan")}})
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json").final == {"train": {"loss": value, "wer": None}}
