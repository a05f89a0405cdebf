"""Word and character errors as counts, to be summed over batches and ranks before dividing.

No torch. Alignment by jiwer, whose default transforms strip and collapse spaces between words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True)
class ErrorCounts:
    """Errors (substitutions, deletions, insertions) and the references' length, same unit."""

    errors: int = 0
    length: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(self.errors + other.errors, self.length + other.length)

    @property
    def rate(self) -> float:
        """Errors over length; NaN if the references hold nothing."""
        return self.errors / self.length if self.length else math.nan


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Word errors; what is said against an empty reference counts as insertions."""
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)]
    inserted = sum(len(hypothesis) for reference, hypothesis in pairs if not reference)
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return ErrorCounts(inserted)
    found = jiwer.process_words(
        [" ".join(reference) for reference, _ in pairs],
        [" ".join(hypothesis) for _, hypothesis in pairs],
    )
    errors = found.substitutions + found.deletions + found.insertions
    return ErrorCounts(errors + inserted, sum(len(reference) for reference, _ in pairs))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Character errors, spaces between words included."""
    pairs = [(r.strip(), h.strip()) for r, h in zip(references, hypotheses, strict=True)]
    inserted = sum(len(hypothesis) for reference, hypothesis in pairs if not reference)
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return ErrorCounts(inserted)
    found = jiwer.process_characters([r for r, _ in pairs], [h for _, h in pairs])
    errors = found.substitutions + found.deletions + found.insertions
    return ErrorCounts(errors + inserted, sum(len(reference) for reference, _ in pairs))
