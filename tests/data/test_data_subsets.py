"""Nested subsets by the study's rule."""

from __future__ import annotations

import numpy as np
import pytest

from reproduce.data.subsets import nested_subsets
from reproduce.records import SUBSETS


def study(seconds: list[float], limit: float, seed: int) -> set[int]:
    """The rule as it reads: shuffle, take until the limit."""
    taken, total = set(), 0.0
    for index in np.random.default_rng(seed).permutation(len(seconds)):
        if total >= limit:
            break
        taken.add(int(index))
        total += seconds[index]
    return taken


@pytest.mark.parametrize("seed", [42, 7])
def test_each_subset_is_the_rule_taken_to_its_limit(seed: int) -> None:
    seconds = np.random.default_rng(0).uniform(1, 16, 5000).round(4).tolist()
    labels = nested_subsets(seconds, seed)
    for level, limit in enumerate((600, 3600, 36000), 1):
        within = {i for i, label in enumerate(labels) if label in SUBSETS[:level]}
        assert within == study(seconds, limit, seed)
        assert limit <= sum(seconds[i] for i in within) < limit + 16


def test_a_corpus_shorter_than_a_limit_is_in_it_whole() -> None:
    assert set(nested_subsets([10.0] * 90)) == {"10min", "1h"}
    assert nested_subsets([1.0, 2.0]) == ["10min", "10min"]
    assert nested_subsets([]) == []


def test_the_utterance_that_crosses_a_limit_belongs_to_the_subset() -> None:
    labels = nested_subsets([400.0] * 10, limits=(600, 3600, 36000))
    assert labels.count("10min") == 2
    assert labels.count("1h") == 7
