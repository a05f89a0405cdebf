"""Functions of the update alone: learning rate, Gumbel temperature, weights of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """A learning-rate schedule over ``length`` steps, one step an update.

    Update ``u`` (the first is 1) uses the factor of step ``u - 1``, as transformers' schedulers do,
    so the first update of a warm-up has rate 0.

    Args:
        peak: the peak rate.
        length: steps from the start to the end of the schedule; the run may stop before.
        kind: ``linear`` (warm-up, then linearly to 0), ``tri_stage`` (warm-up, hold, decay
            to ``final_scale`` of the peak), ``constant``.
        warmup, hold, decay: shares of ``length``.
        decay_form: of ``tri_stage``; ``exponential`` as fairseq's schedule of that name.
    """

    peak: float
    length: int
    kind: Literal["linear", "tri_stage", "constant"] = "linear"
    warmup: float = 0.1
    hold: float = 0.0
    decay: float = 0.0
    decay_form: Literal["exponential", "linear"] = "exponential"
    final_scale: float = 0.05

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.length)

    def __call__(self, update: int) -> float:
        return self.peak * self.factor(update - 1)

    def factor(self, step: int) -> float:
        """The rate over the peak rate after ``step`` steps."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            left = self.length - step
            return max(0.0, left / max(1, self.length - self.warmup_steps))
        held = step - self.warmup_steps - round(self.hold * self.length)
        if held < 0:
            return 1.0
        decayed = min(1.0, held / max(1, round(self.decay * self.length)))
        if self.decay_form == "linear":
            return 1.0 - (1.0 - self.final_scale) * decayed
        return math.exp(math.log(self.final_scale) * decayed)


@dataclass(frozen=True)
class GumbelTemperature:
    """``max(floor, start * factor ** (update - 1))``; with no factor, geometric from ``start`` at
    the first update to ``floor`` at the last (wav2vec 2.0, section 4.2, has 0.999995 and 0.5)."""

    start: float
    floor: float
    factor: float | None
    updates: int

    def __call__(self, update: int) -> float:
        if self.factor is not None:
            return max(self.floor, self.start * self.factor ** (update - 1))
        share = (update - 1) / max(1, self.updates - 1)
        return float(self.start * (self.floor / self.start) ** share)


def micro_batch_weights(
    gradient: Literal["summed", "averaged", "rescaled"], counts: Sequence[int], accumulation: int
) -> list[float] | None:
    """What each micro-batch's summed loss is multiplied by; None: sum all, divide by the count.

    Args:
        gradient: ``averaged`` gives micro-batch j the weight 1/(n_j A): its mean, over the number
            of accumulations even where an epoch's last update has fewer. ``rescaled`` gives it the
            product of 1/n_i over i >= j, over A: the gradient was multiplied by 1/n_i after every
            backward, so earlier micro-batches nearly vanish (the study, as run).
        counts: n_j, masked frames or utterances of each micro-batch of the update.
        accumulation: A.
    """
    if gradient == "summed":
        return None
    if gradient == "averaged":
        return [1.0 / (max(1, count) * accumulation) for count in counts]
    weights = []
    product = 1.0 / accumulation
    for count in reversed(counts):
        product /= max(1, count)
        weights.append(product)
    return weights[::-1]
