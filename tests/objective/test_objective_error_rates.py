"""Word and character errors against edit distance written out, and with empty references."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from reproduce.objective.error_rates import ErrorCounts, character_errors, word_errors


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def test_counts_equal_edit_distance() -> None:
    draw = random.Random(0)
    sentences = [
        " ".join(
            "".join(draw.choices("ab", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 5))
        )
        for _ in range(60)
    ]
    references, hypotheses = sentences[:30], sentences[30:]
    words = word_errors(references, hypotheses)
    assert words.errors == sum(
        distance(r.split(), h.split()) for r, h in zip(references, hypotheses)
    )
    assert words.length == sum(len(r.split()) for r in references)
    characters = character_errors(references, hypotheses)
    assert characters.errors == sum(distance(r, h) for r, h in zip(references, hypotheses))
    assert characters.length == sum(len(r) for r in references)


def test_empty_references_count_insertions() -> None:
    assert word_errors(["", "a b"], ["x y", ""]) == ErrorCounts(4, 2)
    assert character_errors([""], ["x y"]) == ErrorCounts(3, 0)
    assert math.isnan(character_errors([""], ["x y"]).rate)
    assert word_errors([], []) == ErrorCounts()


def test_counts_add_up_and_pairs_must_match() -> None:
    whole = word_errors(["a b", "c d e"], ["a", "c x e"])
    assert word_errors(["a b"], ["a"]) + word_errors(["c d e"], ["c x e"]) == whole
    assert whole.rate == pytest.approx(2 / 5)
    with pytest.raises(ValueError):
        word_errors(["a"], [])
