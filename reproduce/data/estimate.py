"""How large a corpus will be, before anything is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reproduce.data.audio import BYTES_PER_SAMPLE, SAMPLE_RATE, AudioError
from reproduce.data.corpora import AudioSource, Corpus, Utterance, corpus_hours
from reproduce.position import generator

SAMPLED = 400
"""Files whose headers are looked at."""
AT_A_TIME = 16
"""Of them: on a slow mount each takes its time to be opened."""


@dataclass(frozen=True)
class Estimate:
    """Hours of speech, about; utterances where they were counted; bytes of ``data/``."""

    hours: float
    utterances: int | None = None

    @property
    def bytes(self) -> int:
        return round(self.hours * 3600 * SAMPLE_RATE * BYTES_PER_SAMPLE)


def estimate(corpus: Corpus, options: Mapping[str, Any]) -> Estimate:
    """What preparing a corpus will give: as the corpus says, or counted and measured on a sample.

    Args:
        corpus: as `read_corpus` opened it.
        options: the same options.

    Raises:
        DataError: the corpus can't be listed.
    """
    hours = corpus_hours(corpus.name, **options)
    if hours is not None:
        return Estimate(hours)
    draw = generator(0, "estimate")
    sample: list[AudioSource] = []
    count = 0
    for item in corpus:
        if isinstance(item, Utterance):
            count += 1
            if len(sample) < SAMPLED:
                sample.append(item.audio)
            elif (place := int(draw.integers(count))) < SAMPLED:
                sample[place] = item.audio
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        seconds = sum(pool.map(_seconds, sample))
    return Estimate(count * seconds / max(len(sample), 1) / 3600, count)


def _seconds(audio: AudioSource) -> float:
    with suppress(AudioError, OSError):
        return audio.seconds()
    return 0.0  # what can't be used takes no room
