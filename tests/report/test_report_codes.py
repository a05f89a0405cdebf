from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import write_codes, write_run

from reproduce.records import WorkFolder
from reproduce.report.codes import Codes, read_codes
from reproduce.report.measured import read_run


def written(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "codes.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def test_share_in_use_is_the_perplexity_over_the_entries(tmp_path: Path) -> None:
    counts = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])
    shares = read_codes(written(tmp_path, code_counts=counts), "pretrain").in_use()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert shares[:3] == pytest.approx([1.0, 0.25, math.exp(entropy) / 4])
    assert np.isnan(shares[3])


def test_pairs_leave_out_the_diagonal_and_what_is_not_a_number() -> None:
    table = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, np.nan], [0.4, np.nan, 1.0]])
    codes = Codes({"nmi": table, "similarity_first": np.ones((1, 1))})
    assert codes.pair_mean("nmi") == pytest.approx(0.3)
    assert codes.pair_mean("similarity_first") is None  # one codebook has no pair
    assert codes.pair_mean("similarity_last") is None


def test_nothing_there_is_no_problem(tmp_path: Path) -> None:
    assert read_codes(tmp_path / "codes.npz", "pretrain") == Codes()
    assert not len(Codes().in_use())


@pytest.mark.parametrize(
    "arrays",
    [
        {"code_counts": np.ones(4)},
        {"code_counts": np.ones((2, 4)), "nmi": np.ones((3, 3))},
        {"nmi": np.ones((3, 2))},
        {"code_counts": -np.ones((2, 4))},
        {"code_counts": np.array([["a", "b"]])},
        {"code_counts": np.empty((0, 4))},
        {"code_counts": np.array([[{}]], dtype=object)},  # a pickle is never opened
    ],
)
def test_arrays_that_cannot_be(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    codes = read_codes(written(tmp_path, **arrays), "pretrain")
    assert codes == Codes(problem="codes.npz can't be read")


def test_any_damage_is_survived(tmp_path: Path) -> None:
    run = write_run(tmp_path, "finetune", "rvq_4", 1, 3.5)
    write_codes(run, rows=4, entries=16)
    path, whole = run / "codes.npz", (run / "codes.npz").read_bytes()
    folder = next(WorkFolder(tmp_path).runs("finetune"))
    assert read_run(folder).codes.arrays["mse"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(len(whole)) if rng.random() < 0.3 else None])
        for place in rng.integers(0, max(len(damaged), 1), rng.integers(1, 6)):
            if damaged:
                damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        codes = read_run(folder).codes
        assert codes.problem in ("", "codes.npz can't be read")
        assert not (codes.problem and codes.arrays)


def test_bits_and_the_error_left_at_them(tmp_path: Path) -> None:
    counts = np.array([[8, 8, 8, 8], [16, 16, 0, 0], [30, 0, 0, 0]])
    arrays = {"code_counts": counts, "mse": np.array([1.0, 0.5, 0.4])}
    codebooks = np.zeros((3, 4, 10), np.float32)
    codes = read_codes(written(tmp_path, codebooks=codebooks, **arrays), "finetune")
    assert codes.width == 10
    assert codes.bits() == pytest.approx([2, 1, 0])
    # levels 2 and 3 spend 1 bit, so independent features would keep 2^(-2/10) of their variance
    assert codes.error_for_bits() == pytest.approx(math.log(0.4 / 2 ** (-2 / 10)))
    thin = read_codes(written(tmp_path, width=np.array(10), **arrays), "finetune")
    assert thin.error_for_bits() == codes.error_for_bits()
    assert read_codes(written(tmp_path, **arrays), "finetune").error_for_bits() is None
    assert Codes().error_for_bits() is None


def test_no_code_of_gaussian_features_does_better_than_its_bits() -> None:
    """k-means on independent dimensions, the case the measure calls 0 or worse; and on features
    that lie along a line, where it is far below 0."""
    rng = np.random.default_rng(0)

    def measured(features: np.ndarray) -> float:
        residual, counts, errors = features.copy(), [], []
        for _ in range(3):
            codes = residual[rng.choice(len(residual), 16, replace=False)]
            for _ in range(12):
                nearest = ((residual[:, None] - codes) ** 2).sum(2).argmin(1)
                codes = np.stack([
                    residual[nearest == k].mean(0) if (nearest == k).any() else codes[k]
                    for k in range(16)
                ])  # fmt: skip
            residual = residual - codes[nearest]
            counts.append(np.bincount(nearest, minlength=16))
            errors.append(float((residual**2).mean()))
        arrays = {"code_counts": np.array(counts, float), "mse": np.array(errors)}
        left = Codes(arrays, width=features.shape[1]).error_for_bits()
        assert left is not None
        return left

    independent = rng.normal(size=(4000, 8))
    assert measured(independent) > 0
    line = rng.normal(size=(4000, 1)) * rng.normal(size=8) + 0.01 * independent
    assert measured(line) < -1
