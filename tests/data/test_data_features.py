"""Kept features: what is written is read, whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import at_most

from reproduce.data.features import FeatureFile
from reproduce.errors import DataError

FRAMES, WIDTH = [3, 0, 5, 1], 4


def written(path: Path, dtype: str = "float32") -> tuple[FeatureFile, list[torch.Tensor]]:
    file = FeatureFile(path, FRAMES, WIDTH, dtype)  # type: ignore[arg-type]
    features = [torch.randn(frames, WIDTH) for frames in FRAMES]
    with file.lock(pytest.fail):
        file.begin()
        for position in (2, 0, 3, 1):  # in any order
            assert not file.whole
            file.write(position, features[position])
        file.publish()
    return file, features


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, tolerance: float) -> None:
    file, features = written(tmp_path / "new" / "kept", dtype)
    assert file.whole
    assert file.size == sum(FRAMES) * WIDTH * np.dtype(dtype).itemsize
    for position, expected in enumerate(features):
        torch.testing.assert_close(
            torch.tensor(np.array(file[position], np.float32)), expected, rtol=tolerance, atol=0.0
        )
    batch = file.collate([3, 2, 1]).float()
    assert batch.shape == (3, 5, WIDTH)
    torch.testing.assert_close(batch[0, :1], features[3], rtol=tolerance, atol=0.0)
    assert batch[0, 1:].eq(0).all()
    assert batch[2].eq(0).all()
    assert file.collate([1]).shape == (1, 1, WIDTH)  # too short for any frame


def test_a_file_of_another_size_is_not_whole(tmp_path: Path) -> None:
    file, _ = written(tmp_path / "kept")
    os.truncate(file.path, file.size - 1)
    assert not file.whole


def test_where_the_disk_is_full_nothing_stays_in_its_way(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "kept", FRAMES, WIDTH)
    file.begin()
    with at_most(0), pytest.raises(OSError, match="File too large"):
        file.write(2, torch.zeros(5, WIDTH))
    file.drop()
    assert not file.partial.exists()
    assert not file.path.exists()


def test_what_an_interrupted_process_left_goes(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "kept", FRAMES, WIDTH)
    file.partial.write_bytes(b"?" * 500)
    file.begin()
    assert file.partial.read_bytes() == bytes(file.size)
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("dtype", "value", "remedy"),
    [("float16", 1e5, "keep_features=float32"), ("float32", float("nan"), "weights")],
)
def test_values_that_do_not_fit(tmp_path: Path, dtype: str, value: float, remedy: str) -> None:
    file = FeatureFile(tmp_path / "kept", FRAMES, WIDTH, dtype)  # type: ignore[arg-type]
    file.begin()
    with pytest.raises(DataError, match=remedy):
        file.write(0, torch.full((3, WIDTH), value))
    with pytest.raises(ValueError, match="utterance 2"):
        file.write(2, torch.zeros(3, WIDTH))
