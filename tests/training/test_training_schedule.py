"""Learning rate, Gumbel temperature and weights of micro-batches as functions of the update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reproduce.training.schedule import GumbelTemperature, LearningRate, micro_batch_weights


@pytest.mark.parametrize("warmup", [0, 7, 20])
def test_linear_is_the_scheduler_of_transformers(warmup: int) -> None:
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-4)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, 50)
    ours = LearningRate(3e-4, 50, "linear", warmup / 50)
    for update in range(1, 61):  # beyond its end too
        assert ours(update) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_tri_stage() -> None:
    """Up for 20 of 100, held for 40, then exponentially to a twentieth over 30, and there."""
    rate = LearningRate(2.0, 100, "tri_stage", 0.2, 0.4, 0.3, "exponential", 0.05)
    assert [rate(u) for u in (1, 2, 11)] == [0.0, 0.1, 1.0]
    assert {rate(u) for u in range(21, 62)} == {2.0}
    assert rate(76) == pytest.approx(2.0 * 0.05 ** (15 / 30))
    assert rate(91) == pytest.approx(0.1)
    assert rate(1000) == pytest.approx(0.1)
    ratios = [rate(u + 1) / rate(u) for u in range(61, 91)]
    assert np.ptp(ratios) < 1e-12


def test_tri_stage_with_linear_decay() -> None:
    """As the study writes it: up, held, and in a straight line to the last update."""
    rate = LearningRate(2.0, 100, "tri_stage", 0.2, 0.2, 0.6, "linear", 0.0)
    assert {rate(u) for u in range(21, 42)} == {2.0}
    assert [rate(u) for u in (56, 71, 86, 101)] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert np.ptp(np.diff([rate(u) for u in range(41, 102)])) < 1e-12
    partly = LearningRate(2.0, 100, "tri_stage", 0.2, 0.2, 0.6, "linear", 0.25)
    assert [partly(u) for u in (71, 101, 1000)] == pytest.approx([1.25, 0.5, 0.5])


def test_constant() -> None:
    rate = LearningRate(0.5, 10, "constant", 0.2)
    assert [rate(u) for u in (1, 2, 3, 99)] == [0.0, 0.25, 0.5, 0.5]


def test_gumbel_temperature() -> None:
    as_run = GumbelTemperature(2.0, 1.0, 0.999999, 714)
    assert as_run(1) == 2.0
    assert as_run(714) == pytest.approx(2.0 * 0.999999**713)
    assert GumbelTemperature(2.0, 0.5, 0.9, 100)(100) == 0.5
    geometric = GumbelTemperature(2.0, 0.5, None, 101)
    assert geometric(1) == 2.0
    assert geometric(51) == pytest.approx(1.0)
    assert geometric(101) == pytest.approx(0.5)
    assert GumbelTemperature(2.0, 0.5, None, 1)(1) == 2.0


def test_rescaled_weights_are_those_of_a_gradient_multiplied_after_each_backward() -> None:
    counts, accumulation = [280, 480, 301, 17], 4
    rng = np.random.default_rng(0)
    sums = rng.standard_normal(4)  # gradients of the summed losses
    gradient = 0.0
    for count, term in zip(counts, sums, strict=True):
        gradient = (gradient + term / accumulation) / count
    weights = micro_batch_weights("rescaled", counts, accumulation)
    assert weights is not None
    assert float(np.dot(weights, sums)) == pytest.approx(gradient, rel=1e-12)


def test_rescaled_weights_of_the_study() -> None:
    """Relative to the last micro-batch's mean, earlier ones nearly vanish."""
    weights = micro_batch_weights("rescaled", [400] * 4, 4)
    assert weights is not None
    assert [w * 4 * 400 for w in weights] == pytest.approx([400.0**-k for k in (3, 2, 1, 0)])
    assert [float(f"{w:.0e}") for w in weights] == [1e-11, 4e-9, 2e-6, 6e-4]


def test_averaged_weights_divide_by_the_accumulation_even_in_a_short_update() -> None:
    weights = micro_batch_weights("averaged", [8, 8, 2], 8)
    assert weights == [1 / 64, 1 / 64, 1 / 16]


def test_summed_has_no_weights() -> None:
    assert micro_batch_weights("summed", [3, 4], 2) is None


@pytest.mark.parametrize("gradient", ["averaged", "rescaled"])
def test_a_micro_batch_without_frames_divides_by_one(gradient: str) -> None:
    weights = micro_batch_weights(gradient, [5, 0], 2)  # type: ignore[arg-type]
    assert weights is not None
    assert all(math.isfinite(w) for w in weights)
    assert weights[1] == 0.5
