"""A disk that is full while something is saved: the system's error, and nothing left by half."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from faults import at_most

from reproduce.model.folders import save_folder
from reproduce.training.checkpoint import checkpoint_updates, load_checkpoint, save_checkpoint

STATE = {"weights": torch.arange(50_000, dtype=torch.float32)}


@pytest.mark.parametrize("size", [0, 100, 70_000, 199_999])
def test_a_checkpoint_is_the_systems_error_and_the_one_before_stays(
    tmp_path: Path, size: int
) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    with at_most(size), pytest.raises(OSError, match="File too large") as caught:
        save_checkpoint(tmp_path, 2, STATE)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["update-1"]
    assert checkpoint_updates(tmp_path) == [1]
    save_checkpoint(tmp_path, 3, STATE)
    assert torch.equal(load_checkpoint(tmp_path, 3)["weights"], STATE["weights"])


@pytest.mark.parametrize("size", [0, 100, 70_000])
def test_a_model_is_the_systems_error_and_no_part_of_it_stays(tmp_path: Path, size: int) -> None:
    with at_most(size), pytest.raises(OSError, match="File too large") as caught:
        save_folder(tmp_path / "model", {"model_type": "wav2vec2"}, STATE)
    assert caught.value.errno == errno.EFBIG
    assert list((tmp_path / "model").iterdir()) == []
