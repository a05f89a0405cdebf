"""The plan and collation: functions of position, nothing dropped, nothing twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from reproduce.data.audio import PackedAudio
from reproduce.data.batches import Batch, Buckets, Plan, Speech, prefetch
from reproduce.data.columns import Rows
from reproduce.errors import DataError
from reproduce.position import generator

SIZES = [
    (1, 1, 1),
    (1, 4, 3),
    (7, 3, 2),
    (10, 2, 2),
    (13, 2, 4),
    (16, 4, 4),
    (21, 2, 4),
    (64, 8, 2),
]
"""Utterances, batch size, accumulation."""


def slow_short(plan: Plan, epochs: int) -> list[list[list[int]]]:
    """Updates of so many epochs as a data loader without drop_last makes them."""
    updates: list[list[list[int]]] = []
    for epoch in range(epochs):
        order = generator(plan.seed, "shuffle", epoch).permutation(plan.utterances).tolist()
        batches = [order[i : i + plan.batch_size] for i in range(0, len(order), plan.batch_size)]
        for i in range(0, len(batches), plan.accumulation):
            updates.append(batches[i : i + plan.accumulation])
    return updates


@pytest.mark.parametrize(("utterances", "size", "accumulation"), SIZES)
def test_short_epochs(utterances: int, size: int, accumulation: int) -> None:
    plan = Plan(utterances, size, accumulation, 3, "short")
    expected = slow_short(plan, 3)
    per_epoch = len(expected) // 3
    assert plan.updates_per_epoch == per_epoch
    for update, batches in enumerate(expected, 1):
        assert plan.update(update) == batches
        assert plan.ends_epoch(update) == (update % per_epoch == 0)
        assert plan.update_in_epoch(update) == (update - 1) % per_epoch + 1
        assert plan.micro_batches(update) == sum(map(len, expected[:update]))


@pytest.mark.parametrize(("utterances", "size", "accumulation"), SIZES)
def test_carried_epochs(utterances: int, size: int, accumulation: int) -> None:
    plan = Plan(utterances, size, accumulation, 3)
    updates = -(-3 * utterances // (size * accumulation)) + 1
    stream: list[int] = []
    ended = 0
    for update in range(1, updates + 1):
        batches = plan.update(update)
        assert [len(batch) for batch in batches] == [size] * accumulation
        stream += [i for batch in batches for i in batch]
        assert plan.ends_epoch(update) == (len(stream) // utterances > ended)
        ended = len(stream) // utterances
        assert plan.micro_batches(update) == update * accumulation
    for epoch in range(3):
        order = generator(3, "shuffle", epoch).permutation(utterances).tolist()
        assert stream[epoch * utterances : (epoch + 1) * utterances] == order
        assert Counter(order) == Counter(range(utterances))


def speechlike(utterances: int) -> np.ndarray:
    """Samples of utterances between 2 and 16 s."""
    return np.random.default_rng(5).integers(32000, 256000, utterances)


@pytest.mark.parametrize("samples", [None, 600000])
@pytest.mark.parametrize("epoch_end", ["carry", "short"])
@pytest.mark.parametrize(("utterances", "size", "accumulation"), SIZES)
def test_bucketed_epochs(
    utterances: int, size: int, accumulation: int, epoch_end: Any, samples: int | None
) -> None:
    lengths = speechlike(utterances)
    buckets = Buckets(lengths, size, samples)
    plan = Plan(utterances, size, accumulation, 3, epoch_end, buckets)
    if samples is None:
        assert len(buckets) == -(-utterances // size)
    per_epoch = plan.micro_batches_per_epoch
    epochs: list[list[list[int]]] = [[] for _ in range(3)]
    count = 0
    for update in range(1, 10**6):
        batches = plan.update(update)
        assert batches == plan.update(update)
        before, count = count, count + len(batches)
        assert plan.micro_batches(update) == count
        assert plan.ends_epoch(update) == (count // per_epoch > before // per_epoch)
        for number, batch in enumerate(batches, before):
            assert 1 <= len(batch) <= size
            padded = len(batch) * int(lengths[batch].max())
            assert samples is None or len(batch) == 1 or padded <= samples
            if number < 3 * per_epoch:
                epochs[number // per_epoch].append(batch)
        if count >= 3 * per_epoch:
            break
    for epoch in epochs:
        assert Counter(i for batch in epoch for i in batch) == Counter(range(utterances))
    assert sorted(map(len, epochs[0])) == sorted(map(len, epochs[1]))


def padding(plan: Plan, lengths: np.ndarray, updates: int) -> float:
    """Share of samples that are padding."""
    batches = [batch for update in range(1, updates + 1) for batch in plan.update(update)]
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded


def test_buckets_hold_hardly_any_padding_and_epochs_differ() -> None:
    lengths = speechlike(2850)
    bucketed = Plan(2850, 8, 8, 1, buckets=Buckets(lengths, 8))
    assert padding(Plan(2850, 8, 8, 1), lengths, 44) > 0.3
    assert padding(bucketed, lengths, 44) < 0.015
    assert padding(Plan(2850, 64, 8, 1, buckets=Buckets(lengths, 64, 2560000)), lengths, 44) < 0.02
    first, second = (
        {frozenset(b) for u in range(e * 44 + 1, e * 44 + 45) for b in bucketed.update(u)}
        for e in (0, 1)
    )
    assert len(first & second) < 0.05 * len(first)
    # neighbours in an epoch are of any length: batches are shuffled
    means = [lengths[batch].mean() for update in range(1, 45) for batch in bucketed.update(update)]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2


def test_utterances_of_one_length_are_shuffled_in_buckets_too() -> None:
    """Cropped to the same length, batches are of any utterances."""
    plan = Plan(64, 4, 2, 1, buckets=Buckets(np.full(64, 96000), 4))
    epochs = [[b for u in range(e * 8 + 1, e * 8 + 9) for b in plan.update(u)] for e in range(2)]
    assert not {frozenset(b) for b in epochs[0]} & {frozenset(b) for b in epochs[1]}


def test_an_utterance_longer_than_the_bound_is_a_batch_by_itself() -> None:
    buckets = Buckets(np.array([50, 10, 10, 200, 10]), 4, 60)
    batches = sorted(sorted(buckets.batch(1, 0, n)) for n in range(len(buckets)))
    assert batches == [[0], [1, 2, 4], [3]]


def test_epochs_end_where_they_do_however_often_they_are_counted() -> None:
    """In whole numbers: 7 utterances at 10 an update end an epoch in every update, for ever."""
    plan = Plan(7, 5, 2, 0)
    assert all(plan.ends_epoch(update) for update in range(1, 5000))
    plan = Plan(49, 5, 2, 0)
    assert sum(plan.ends_epoch(update) for update in range(1, 4901)) == 1000


def test_an_update_needs_no_update_before_it() -> None:
    plan = Plan(21, 2, 4, 1)
    backwards = [plan.update(update) for update in range(30, 0, -1)]
    assert backwards[::-1] == [plan.update(update) for update in range(1, 31)]
    assert Plan(21, 2, 4, 2).update(1) != plan.update(1)


# ----------------------------------------------------------------------------------- collation


@pytest.fixture
def audio(tmp_path: Path) -> PackedAudio:
    pcm = np.random.default_rng(0).integers(-9000, 9000, 60_000).astype(np.int16)
    pcm.tofile(tmp_path / "audio.pcm")
    return PackedAudio(tmp_path / "audio.pcm")


def frame(samples: list[int], texts: list[str] | None = None) -> Rows:
    offsets = np.cumsum([0, *samples[:-1]])
    ids = [f"u{i}" for i in range(len(samples))]
    return Rows(pa.table({"id": ids, "samples": samples, "offset": offsets, "text": texts or ids}))


def normalized(pcm: np.ndarray) -> np.ndarray:
    values = pcm.astype(np.float64) / 32768
    return np.asarray((values - values.mean()) / np.sqrt(values.var() + 1e-7))


def test_collate_cuts_normalizes_and_pads(audio: PackedAudio) -> None:
    speech = Speech(frame([20_000, 8_000, 16_000]), audio, crop_seconds=1.0)
    assert speech.lengths([0, 1, 2]) == [16_000, 8_000, 16_000]
    assert speech.seconds == 2.5
    batch = speech.collate([2, 1, 0])
    assert batch.ids == ["u2", "u1", "u0"]
    assert batch.lengths.tolist() == [16_000, 8_000, 16_000]
    assert batch.waveform.shape == (3, 16_000)
    assert batch.seconds == 2.5
    starts = [28_000, 20_000, 0]
    for row, start, length in zip(batch.waveform, starts, batch.lengths.tolist(), strict=True):
        expected = normalized(np.array(audio.slice(start, length)))
        assert np.allclose(row[:length].numpy(), expected, atol=1e-5)
        assert not row[length:].any()


def test_random_crops_follow_from_the_position(audio: PackedAudio) -> None:
    speech = Speech(frame([40_000, 12_000]), audio, crop_seconds=1.0, crop="random")
    whole = np.array(audio.slice(0, 40_000))
    found = set()
    for update in range(1, 60):
        batch = speech.collate([0, 1], generator(1, "crop", update, 0))
        again = speech.collate([0, 1], generator(1, "crop", update, 0))
        assert torch.equal(batch.waveform, again.waveform)
        start = int(generator(1, "crop", update, 0).integers(24_001))
        expected = normalized(whole[start : start + 16_000])
        assert np.allclose(batch.waveform[0].numpy(), expected, atol=1e-5)
        found.add(start)
    assert len(found) > 50
    assert min(found) < 3_000
    assert max(found) > 21_000


def test_without_a_generator_crops_begin_at_the_start(audio: PackedAudio) -> None:
    speech = Speech(frame([40_000]), audio, crop_seconds=1.0, crop="random")
    expected = normalized(np.array(audio.slice(0, 16_000)))
    assert np.allclose(speech.collate([0]).waveform[0].numpy(), expected, atol=1e-5)


def test_nothing_left_is_told(audio: PackedAudio) -> None:
    with pytest.raises(DataError, match="no train utterance is left"):
        Speech(frame([8_000]).take(np.array([], int)), audio, what="train utterance")


# ------------------------------------------------------------------------------------ prefetch


def made(position: int) -> list[Batch]:
    empty = torch.zeros(0)
    return [Batch(empty, empty, [str(position)], [])]


def test_prefetch_keeps_the_order_one_ahead() -> None:
    begun: list[int] = []

    def make(position: int) -> list[Batch]:
        begun.append(position)
        return made(position)

    found = []
    for batches in prefetch(make, 3, 9):
        found.append(batches[0].ids[0])
        time.sleep(0.002)
        assert len(begun) <= len(found) + 1
    assert found == list("3456789")
    assert begun == list(range(3, 10))
    assert list(prefetch(make, 5, 4)) == []


@pytest.mark.parametrize(("ahead", "readers"), [(1, 4), (3, 1), (3, 2), (4, 4)])
def test_several_readers_keep_the_order_and_the_depth(ahead: int, readers: int) -> None:
    begun: list[int] = []
    threads: set[int] = set()

    def make(position: int) -> int:
        begun.append(position)
        threads.add(threading.get_ident())
        time.sleep(0.01 * (position % 3))
        return position

    for used, found in enumerate(prefetch(make, 3, 20, ahead=ahead, readers=readers)):
        assert found == 3 + used
        time.sleep(0.005)
        assert len(begun) <= used + 1 + ahead
    assert sorted(begun) == list(range(3, 21))
    assert len(threads) <= min(ahead, readers)


def test_prefetch_raises_what_was_raised_where_it_was() -> None:
    def make(position: int) -> list[Batch]:
        if position == 3:
            raise DataError("gone")
        return made(position)

    batches = prefetch(make, 1, 5)
    assert [next(batches)[0].ids[0] for _ in range(2)] == ["1", "2"]
    with pytest.raises(DataError, match="gone"):
        next(batches)


def test_a_closed_prefetch_leaves_no_thread() -> None:
    before = threading.active_count()
    batches: Any = prefetch(made, 1, 100)
    next(batches)
    batches.close()
    assert threading.active_count() == before
