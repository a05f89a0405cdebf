from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from reproduce.objective.codes import code_counts, code_nmi, code_nmi_table


def slow_nmi(left: list[int], right: list[int]) -> float:
    count = len(left)
    one, two, both = Counter(left), Counter(right), Counter(zip(left, right, strict=True))
    information = sum(
        n / count * math.log(n * count / (one[a] * two[b])) for (a, b), n in both.items()
    )
    entropies = (-sum(n / count * math.log(n / count) for n in c.values()) for c in (one, two))
    return 2 * information / sum(entropies)


def test_is_the_slow_sum() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 7, (200, 3))
    codes[:, 2] = (codes[:, 0] + rng.integers(0, 2, 200)) % 7
    measured = code_nmi_table(codes, 7).measured
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = slow_nmi(codes[:, i].tolist(), codes[:, j].tolist())
        assert measured[i, j] == pytest.approx(expected)
        assert measured[j, i] == measured[i, j]
    assert np.isnan(np.diagonal(measured)).all()


def test_baseline_takes_the_bias_off() -> None:
    """Independent codes at V = 320: the estimate is mostly bias, the difference is none."""
    rng = np.random.default_rng(1)
    for frames, bias in ((1000, 0.76), (67000, 0.14)):
        codes = rng.integers(0, 320, (frames, 2))
        table = code_nmi_table(codes, 320)
        assert table.measured[0, 1] == pytest.approx(bias, abs=0.01)
        assert table.baseline[0, 1] == pytest.approx(bias, abs=0.01)
        assert abs(code_nmi(codes, 320)) < 0.01


def test_ends_of_the_scale() -> None:
    codes = np.random.default_rng(2).integers(0, 20, (20000, 1))
    assert code_nmi(np.hstack([codes, (codes + 3) % 20]), 20) == pytest.approx(1.0, abs=0.02)
    assert code_nmi(np.zeros((50, 4), dtype=np.int64), 20) == 0.0
    assert math.isnan(code_nmi(codes, 20))
    assert math.isnan(code_nmi(np.zeros((0, 2), dtype=np.int64), 20))


def test_same_seed_same_number() -> None:
    codes = np.random.default_rng(3).integers(0, 30, (500, 4))
    assert code_nmi(codes, 30, seed=5) == code_nmi(codes, 30, seed=5)


def test_counts() -> None:
    codes = np.array([[0, 2], [0, 1], [3, 1]])
    assert code_counts(codes, 4).tolist() == [[2, 0, 0, 1], [0, 2, 1, 0]]
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        code_counts(codes, 3)


def test_needs_no_torch() -> None:
    probe = "import sys, reproduce.objective.codes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)
