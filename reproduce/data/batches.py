"""The plan (update -> micro-batches of utterances) and collation. Both are functions of position.

Shapes: B utterances of a micro-batch, T samples of the longest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from reproduce.data.audio import SAMPLE_RATE, PackedAudio, normalize, to_float
from reproduce.data.features import FeatureFile
from reproduce.errors import DataError
from reproduce.position import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from reproduce.data.columns import Rows


T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Which utterances each micro-batch of each update holds.

    Every epoch holds all utterances in a fresh order, a function of (seed, epoch); nothing is
    dropped.

    Args:
        utterances: N.
        batch_size: utterances a micro-batch; with buckets, at most.
        accumulation: micro-batches an update.
        seed: of the orders.
        epoch_end: ``carry`` lets updates run on into the next epoch, and batches without buckets
            too, so that all are full; ``short`` ends each epoch with a smaller micro-batch and a
            shorter update where N doesn't divide evenly, as a data loader without ``drop_last``
            does.
        buckets: batches of utterances of similar length; None: of any.
    """

    utterances: int
    batch_size: int
    accumulation: int
    seed: int
    epoch_end: Literal["carry", "short"] = "carry"
    buckets: Buckets | None = field(default=None, compare=False)

    @property
    def updates_per_epoch(self) -> float:
        """Whole for ``short``."""
        if self.epoch_end == "short":
            return math.ceil(self.micro_batches_per_epoch / self.accumulation)
        if self.buckets is not None:
            return len(self.buckets) / self.accumulation
        return self.utterances / (self.batch_size * self.accumulation)

    @property
    def micro_batches_per_epoch(self) -> int:
        if self.buckets is not None:
            return len(self.buckets)
        return math.ceil(self.utterances / self.batch_size)

    def micro_batches(self, updates: int) -> int:
        """Micro-batches in the first ``updates`` updates."""
        if self.epoch_end == "carry":
            return updates * self.accumulation
        epochs, rest = divmod(updates, int(self.updates_per_epoch))
        return epochs * self.micro_batches_per_epoch + min(
            rest * self.accumulation, self.micro_batches_per_epoch
        )

    def ends_epoch(self, update: int) -> bool:
        """Whether an epoch ends with or within this update (the first is 1)."""
        if self.epoch_end == "short":
            return update % int(self.updates_per_epoch) == 0
        size, epoch = self.batch_size * self.accumulation, self.utterances
        if self.buckets is not None:
            size, epoch = self.accumulation, len(self.buckets)
        return update * size // epoch > (update - 1) * size // epoch

    def update_in_epoch(self, update: int) -> int:
        """1 for the first update of an epoch; with ``carry``, the update itself."""
        if self.epoch_end == "carry":
            return update
        return (update - 1) % int(self.updates_per_epoch) + 1

    def update(self, update: int) -> list[list[int]]:
        """The micro-batches of an update (the first is 1): positions 0..N-1 in the selection."""
        size, per_update = self.batch_size, self.accumulation
        if self.buckets is not None:
            return self._bucketed(update, self.buckets)
        if self.epoch_end == "carry":
            first = (update - 1) * size * per_update
            return [
                [self._at(first + j * size + i) for i in range(size)] for j in range(per_update)
            ]
        epoch, within = divmod(update - 1, int(self.updates_per_epoch))
        order = _permutation(self.seed, epoch, self.utterances)
        first = within * size * per_update
        rows = [int(row) for row in order[first : first + size * per_update]]
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _bucketed(self, update: int, buckets: Buckets) -> list[list[int]]:
        if self.epoch_end == "carry":
            first = (update - 1) * self.accumulation
            places = [divmod(first + j, len(buckets)) for j in range(self.accumulation)]
        else:
            epoch, within = divmod(update - 1, int(self.updates_per_epoch))
            first = within * self.accumulation
            last = min(first + self.accumulation, len(buckets))
            places = [(epoch, number) for number in range(first, last)]
        return [buckets.batch(self.seed, epoch, number) for epoch, number in places]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self.utterances)
        return int(_permutation(self.seed, epoch, self.utterances)[index])


class Buckets:
    """An epoch cut into batches of utterances of similar length, so that little is padded.

    Utterances are put in order of length, up to a relative noise of `NOISE` that is drawn anew
    each epoch, cut into batches, and the batches are shuffled. Every epoch has as many batches of
    the same sizes; ``len`` tells how many. The idea is that of fairseq's ``batch_by_size`` and
    lhotse's bucketing samplers.

    Args:
        lengths: samples of each utterance [N].
        size: utterances a batch, at most.
        samples: samples a batch, padding included, at most; an utterance that is longer is a batch
            by itself. None: no bound.
    """

    NOISE = 0.01

    def __init__(self, lengths: np.ndarray, size: int, samples: int | None = None) -> None:
        self.lengths = np.asarray(lengths)
        utterances = len(self.lengths)
        if samples is None:
            starts = np.arange(0, utterances, size)
        else:
            # The r-th of the noisy order is at most this much longer than the r-th longest.
            slack = (1 + self.NOISE) / (1 - self.NOISE)
            longest = np.sort(self.lengths) * slack
            cuts, first = [0], 0
            while True:
                allowed = longest[first : first + size] * np.arange(
                    1, min(size, utterances - first) + 1
                )
                first += max(1, int(np.searchsorted(allowed, samples, side="right")))
                if first >= utterances:
                    break
                cuts.append(first)
            starts = np.array(cuts)
        self.starts = np.append(starts, utterances)
        self._epoch = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, seed: int, epoch: int, number: int) -> list[int]:
        """Positions 0..N-1 of a batch of an epoch, both counted from 0."""
        order, batches = self._epoch(seed, epoch)
        which = batches[number]
        return [int(row) for row in order[self.starts[which] : self.starts[which + 1]]]

    def _order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = generator(seed, "buckets", epoch)
        noise = 1 + self.NOISE * rng.uniform(-1.0, 1.0, len(self.lengths))
        return np.argsort(self.lengths * noise, kind="stable"), rng.permutation(len(self))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, utterances: int) -> np.ndarray:
    return generator(seed, "shuffle", epoch).permutation(utterances)


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch.

    Attributes:
        waveform: float32 [B, T], each utterance normalized or as recorded, zeros behind it.
        lengths: int64 [B], samples.
        ids, texts: B each.
        features: [B, F, D] of a frozen encoder, where they were kept; ``waveform`` is then empty.
    """

    waveform: torch.Tensor
    lengths: torch.Tensor
    ids: list[str]
    texts: list[str]
    features: torch.Tensor | None = None

    @property
    def seconds(self) -> float:
        """Seconds of audio, without padding."""
        return float(self.lengths.sum()) / SAMPLE_RATE

    def pinned(self, device: torch.device) -> Batch:
        """Itself, in memory that a CUDA device copies from while it computes."""
        if device.type != "cuda":
            return self
        features = None if self.features is None else self.features.pin_memory()
        return replace(self, waveform=self.waveform.pin_memory(), features=features)


_ENDLESS = 2**31 - 1
"""samples: longer than what one file may hold."""


class Speech:
    """A selection of a manifest, ready to be cut into batches.

    Of each utterance it holds a few bytes; ids, texts and offsets are looked up in the manifest,
    whose memory all processes share.

    Args:
        rows: manifest rows (``id``, ``samples``, ``offset``, ``text``).
        audio: the packed audio they lie in.
        crop_seconds: longer utterances are cropped to this; None: never.
        crop: where a crop lies: at the ``start``, or at ``random`` by position.

    Attributes:
        samples: of each utterance, before cropping, int32 [N].
        ids, texts: sequences of N, made when they are asked for.
        features: if set, batches are cut from them and no audio is read.
        normalized: whether each utterance has zero mean and unit variance, or is as recorded.

    Raises:
        DataError: no row is left.
    """

    features: FeatureFile | None = None
    normalized = True

    def __init__(
        self,
        rows: Rows,
        audio: PackedAudio,
        *,
        crop_seconds: float | None = None,
        crop: Literal["start", "random"] = "start",
        what: str = "utterance",
    ) -> None:
        if not len(rows):
            raise DataError(
                f"no {what} is left",
                where="manifest.csv",
                do="check data.subset, min_seconds and max_seconds against data/summary.json",
            )
        self.rows, self.audio, self.crop = rows, audio, crop
        self.ids, self.texts = rows.strings("id"), rows.strings("text")
        self.samples: NDArray[np.int32] = rows.array("samples", np.int32)
        longest = round(crop_seconds * SAMPLE_RATE) if crop_seconds else _ENDLESS
        self.longest = min(longest, _ENDLESS)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def cropped(self) -> NDArray[np.int32]:
        """Samples of each utterance after cropping, [N]."""
        return np.minimum(self.samples, self.longest, dtype=np.int32)

    @property
    def seconds(self) -> float:
        """Seconds of audio after cropping, all utterances once."""
        return float(self.cropped.sum(dtype=np.int64)) / SAMPLE_RATE

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Samples of these utterances after cropping; no audio is read."""
        return [min(int(self.samples[i]), self.longest) for i in positions]

    def collate(self, positions: Sequence[int], rng: np.random.Generator | None = None) -> Batch:
        """Cut, crop, normalize if wanted, and pad. ``rng`` places random crops; without: at 0."""
        lengths = self.lengths(positions)
        kept = self.features
        return Batch(
            torch.empty(len(lengths), 0) if kept else self._waveform(positions, lengths, rng),
            torch.tensor(lengths, dtype=torch.int64),
            [self.ids[i] for i in positions],
            [self.texts[i] for i in positions],
            kept.collate(positions) if kept else None,
        )

    def _waveform(
        self, positions: Sequence[int], lengths: Sequence[int], rng: np.random.Generator | None
    ) -> torch.Tensor:
        waveform = np.zeros((len(positions), max(lengths)), np.float32)
        for row, (i, length) in enumerate(zip(positions, lengths, strict=True)):
            spare = int(self.samples[i]) - length
            shift = 0
            if rng is not None and self.crop == "random":
                shift = int(rng.integers(spare + 1))
            pcm = self.audio.slice(self.rows.at("offset", i) + shift, length)
            samples = to_float(pcm)
            waveform[row, :length] = normalize(samples) if self.normalized else samples
        return torch.from_numpy(waveform)


def prefetch(
    make: Callable[[int], T], first: int, last: int, *, ahead: int = 1, readers: int = 1
) -> Generator[T, None, None]:
    """``make(first) .. make(last)``, in order, made in threads while earlier ones are used.

    Args:
        make: a function of its position; with several readers called by several threads at once.
        first, last: positions.
        ahead: how many are made, or being made, before they are asked for.
        readers: threads.
    """
    if first > last:
        return
    pool = ThreadPoolExecutor(min(readers, ahead))
    try:
        waiting: deque[Future[T]] = deque()
        for position in range(first, last + ahead + 1):
            if position <= last:
                waiting.append(pool.submit(make, position))
            if position >= first + ahead:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
