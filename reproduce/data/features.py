"""Features of a selection of utterances in one file: written once, read through a memory map.

The file is the utterances' features [F, D] one behind the other, without padding and without a
header: what it holds follows from its name, which its maker derives from everything that decides
the numbers. It is whole or absent, and any number of processes may ask for it at once.

Letters: F frames of an utterance, D width.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from reproduce.errors import DataError

FeatureType = Literal["float32", "float16"]


class FeatureFile:
    """Features of some utterances.

    Args:
        path: of the file.
        frames: F of each utterance.
        width: D.
        dtype: what is stored.
    """

    def __init__(
        self, path: Path, frames: Sequence[int], width: int, dtype: FeatureType = "float32"
    ) -> None:
        self.path, self.width, self.dtype = path, width, np.dtype(dtype)
        self.frames: NDArray[np.int64] = np.asarray(frames, np.int64)
        self.starts: NDArray[np.int64] = np.cumsum(self.frames) - self.frames
        self._map: NDArray[np.floating] | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return int(self.frames.sum()) * self.width * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    @property
    def partial(self) -> Path:
        """Where it grows."""
        return self.path.with_name(f".{self.path.name}.partial")

    # ------------------------------------------------------------------------------------- writing

    @contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Only one process at a time; others call ``waiting`` and wait here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def begin(self) -> None:
        """Make the empty partial file; what an interrupted process left there goes.

        Raises:
            DataError: the disk has no room for the whole file.
        """
        self.partial.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise DataError(
                f"the features take {self.size / 1e9:.2f} GB, free are {free / 1e9:.2f} GB",
                where=str(self.path.parent),
                do="--set finetune.keep_features=float16 halves it, =no keeps none; or choose "
                "another --work folder",
            )
        with open(self.partial, "wb") as file:
            file.truncate(self.size)

    def write(self, position: int, features: torch.Tensor) -> None:
        """Put an utterance's features [F, D] into the partial file.

        Raises:
            DataError: values that aren't finite in the stored type.
        """
        values = features.detach().to("cpu", getattr(torch, self.dtype.name)).numpy()
        if values.shape != (self.frames[position], self.width):
            raise ValueError(f"features {list(values.shape)} of utterance {position}")
        if not np.isfinite(values).all():
            raise DataError(
                f"features of utterance {position} aren't finite in {self.dtype}",
                where=str(self.path.parent),
                do="--set finetune.keep_features=float32"
                if self.dtype == np.float16
                else "check the encoder's weights",
            )
        with open(self.partial, "r+b") as file:
            file.seek(int(self.starts[position]) * self.width * self.dtype.itemsize)
            file.write(values.tobytes())

    def drop(self) -> None:
        """The partial file won't become whole: where the disk is full it is in the way."""
        self.partial.unlink(missing_ok=True)

    def publish(self) -> None:
        """The partial file is whole: flush it to the disk and give it its name."""
        with open(self.partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)

    # ------------------------------------------------------------------------------------- reading

    def __getitem__(self, position: int) -> NDArray[np.floating]:
        """Features [F, D] of one utterance: a view of the file, nothing is copied."""
        if self._map is None:
            self._map = np.memmap(self.path, self.dtype, "r").reshape(-1, self.width)
        start = int(self.starts[position])
        return self._map[start : start + int(self.frames[position])]

    def collate(self, positions: Sequence[int]) -> torch.Tensor:
        """Features [B, F, D] in the stored type, zeros behind the shorter ones; F is at least 1."""
        longest = max(1, int(self.frames[list(positions)].max()))
        padded = np.zeros((len(positions), longest, self.width), self.dtype)
        for row, position in enumerate(positions):
            padded[row, : self.frames[position]] = self[position]
        return torch.from_numpy(padded)
