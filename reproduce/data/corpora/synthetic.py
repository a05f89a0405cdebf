"""The embedded corpus: sentences of common English words, spelled aloud by synthetic speakers.

It needs no download, comes in any number of hours, and is learnable on a laptop: each letter has a
sound of its own. Everything follows from the seed and the utterance's id, so a corpus of more hours
begins with the same utterances. Ids, texts and lengths are known without synthesis and are the same
on every platform; the samples are the same on the same platform.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from reproduce.data.audio import Decoded
from reproduce.data.corpora import AudioSource, Utterance
from reproduce.data.corpora.synthetic_voice import (
    PAUSE,
    PHASES,
    PHASES_OF,
    RATE,
    Ints,
    Voice,
    synthesize,
)
from reproduce.data.corpora.synthetic_words import PATTERNS, WORDS
from reproduce.errors import UsageError
from reproduce.position import generator

VERSION = 5
"""Raise it when the same id gets another text, length or sound."""

SHORTEST = 2.0
"""Seconds: the least ``max_seconds`` that surely has room for a sentence."""

FEWEST_WORDS = 2
"""The least ``words``: with one of each kind there are too few sentences for two splits."""

_VALID_SHARE = 4
"""One sentence in four belongs to the validation split, by its hash: no sentence is in both."""

_TRIES = 20
"""Sentences tried for the room that is left in an utterance before it is closed."""

_BREAK = 0.25
"""Share of the gaps between words at which the speaker pauses; between sentences always."""

_CHANCES = {
    name: list(accumulate(1.0 / (rank + 2) for rank in range(len(words))))
    for name, words in WORDS.items()
}
_MILLISECONDS = np.array([phase.ms for phase in PHASES])


@dataclass(frozen=True, eq=False)
class Score:
    """What an utterance will say and how long each sound lasts; cheap to make.

    phases: [S] indices into the synthesizer's phases; samples: [S] their lengths at 16 kHz.
    """

    text: str
    phases: Ints
    samples: Ints

    @property
    def length(self) -> int:
        """Length of the utterance in samples at 16 kHz."""
        return int(self.samples.sum())


@dataclass(frozen=True)
class SyntheticAudio(AudioSource):
    """Audio that is made when it is loaded."""

    seed: int
    id: str
    min_seconds: float
    max_seconds: float
    words: int | None = None

    def score(self) -> Score:
        """Text and lengths, without synthesis."""
        return compose(self.seed, self.id, self.min_seconds, self.max_seconds, self.words)

    def load(self) -> Decoded:
        """Synthesize; ``sha256`` is that of the score and the speaker, not of the samples."""
        score, voice = self.score(), _voice(self.seed, self.id)
        digest = hashlib.sha256(f"{VERSION}\n{self.seed}\n{self.id}\n{score.text}\n".encode())
        digest.update(score.phases.astype("<i4").tobytes())
        digest.update(score.samples.astype("<i4").tobytes())
        samples = synthesize(
            score.phases, score.samples, voice, generator(self.seed, "synthetic-sound", self.id)
        )
        return Decoded(samples=samples, rate=RATE, sha256=digest.hexdigest())

    def stamp(self) -> str:
        """Changes with the synthesizer and the limits; the seed and id stand in the source."""
        return f"synthetic {VERSION} {self.min_seconds} {self.max_seconds} {self.words}"


def hours(*, hours: float, valid_hours: float, **others: object) -> float:
    """About, for ``--dry-run``: each split ends with the utterance that reaches its hours."""
    return hours + valid_hours


def utterances(
    *,
    hours: float,
    valid_hours: float,
    speakers: int,
    valid_speakers: int,
    seed: int,
    min_seconds: float = 2.0,
    max_seconds: float = 15.0,
    words: int | None = None,
) -> Iterator[Utterance]:
    """The corpus, training split first; speakers take turns, those of the splits differ.

    ``words`` leaves that many words of each kind, the common ones; None: all of them.

    Each split ends with the utterance that reaches its hours. Memory is constant in the hours, and
    nothing is synthesized before ``audio.load()``.

    Raises:
        UsageError: an option that no corpus can satisfy.
    """
    parts = (("train", hours, speakers), ("valid", valid_hours, valid_speakers))
    for split, wanted, voices in parts:
        if not (math.isfinite(wanted) and wanted >= 0):
            raise UsageError(f"{wanted} hours", where=f"synthetic {split}", do="give 0 or more")
        if wanted > 0 and voices < 1:
            raise UsageError(f"{voices} speakers", where=f"synthetic {split}", do="give 1 or more")
    if not (0 < min_seconds <= max_seconds and SHORTEST <= max_seconds < math.inf):
        raise UsageError(
            f"utterances of {min_seconds} to {max_seconds} s",
            where="synthetic",
            do=f"min_seconds must be positive, max_seconds no less and at least {SHORTEST}",
        )
    if words is not None and words < FEWEST_WORDS:
        raise UsageError(
            f"{words} words of each kind", where="synthetic", do=f"give {FEWEST_WORDS} or more"
        )
    return _utterances(parts, seed, min_seconds, max_seconds, words)


def _utterances(
    parts: tuple[tuple[str, float, int], ...],
    seed: int,
    min_seconds: float,
    max_seconds: float,
    words: int | None,
) -> Iterator[Utterance]:
    for split, wanted, voices in parts:
        left, index = wanted * 3600 * RATE, 0
        while left > 0:
            speaker = f"{index % voices:03d}"
            id = f"{split}-{index:06d}-{speaker}"
            audio = SyntheticAudio(seed, id, min_seconds, max_seconds, words)
            score = audio.score()
            yield Utterance(
                id=audio.id,
                split=split,
                speaker=f"{split}-{speaker}",
                text=score.text,
                source=f"synthetic:{seed}/{audio.id}",
                audio=audio,
            )
            left -= score.length
            index += 1


def compose(
    seed: int, id: str, min_seconds: float, max_seconds: float, most_words: int | None = None
) -> Score:
    """Whole sentences, up to a length drawn evenly between the limits.

    A sentence that doesn't fit is drawn anew; where none does, the last pause is made as long as
    ``min_seconds`` asks for.
    """
    split = id.split("-")[0]
    rng, tempo = generator(seed, "synthetic-score", id), _voice(seed, id).tempo
    least, most = math.ceil(min_seconds * RATE), math.floor(max_seconds * RATE)
    target, breaks = least + rng.random() * (most - least), generator(seed, "synthetic-breaks", id)
    words: list[str] = []
    phases, samples = [PHASES_OF["pause"]], [_lengths(PHASES_OF["pause"], tempo, rng) // 2]
    total, misses = int(samples[0].sum()), 0
    while not words or (total < target and misses < _TRIES):
        sentence = _sentence(split, rng.random, most_words)
        spelled = _spell(sentence, breaks.random) + PHASES_OF["pause"]
        lengths = _lengths(spelled, tempo, rng)
        if total + int(lengths.sum()) > most:
            misses += 1
            continue
        words += sentence
        phases.append(spelled)
        samples.append(lengths)
        total += int(lengths.sum())
    samples[-1][-1] += max(least - total, 0)
    return Score(" ".join(words), np.concatenate(phases), np.concatenate(samples))


def _voice(seed: int, id: str) -> Voice:
    """The speaker of an utterance: high voices tend to come from short tracts."""
    split, _, speaker = id.split("-")
    size, shape, tempo, breath = generator(seed, "synthetic-speaker", split, speaker).random(4)
    return Voice(
        pitch=85.0 * (240.0 / 85.0) ** size,
        tract=0.85 + 0.35 * (0.7 * size + 0.3 * shape),
        tempo=0.85 + 0.35 * tempo,
        breath=0.02 + 0.06 * breath,
    )


def _sentence(split: str, draw: Callable[[], float], most: int | None) -> list[str]:
    """Words of a sentence that belongs to the split, by its hash."""
    while True:
        words = _expand("sentence", draw, most)
        for at, (word, following) in enumerate(pairwise(words)):
            if word == "A" and following[0] in "AEIOU":
                words[at] = "AN"
        hashed = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
        if (hashed[0] % _VALID_SHARE == 0) == (split == "valid"):
            return words


def _expand(symbol: str, draw: Callable[[], float], most: int | None) -> list[str]:
    name, _, ending = symbol.partition("+")
    if patterns := PATTERNS.get(name):
        chosen = patterns[int(draw() * len(patterns))]
        return [word for part in chosen.split() for word in _expand(part, draw, most)]
    chances = _CHANCES[name][:most]
    at = draw() * chances[-1]
    return [WORDS[name][next(i for i, edge in enumerate(chances) if at < edge)] + ending]


def _spell(words: list[str], draw: Callable[[], float]) -> tuple[int, ...]:
    """Phase indices of words, here and there with a pause between them.

    Equal letters side by side are parted by a dip, so that both are heard.
    """
    spelled: tuple[int, ...] = ()
    for number, word in enumerate(words):
        if number:
            spelled += PHASES_OF["pause" if draw() < _BREAK else " "]
        for before, letter in zip(" " + word, word):
            spelled += (PHASES_OF["again"] if letter == before else ()) + PHASES_OF[letter]
    return spelled


def _lengths(phases: tuple[int, ...], tempo: float, rng: np.random.Generator) -> Ints:
    """Samples of each phase: its own duration, the speaker's tempo, and 15 % either way.

    Pauses vary more: 60 % either way.
    """
    drawn = rng.random(len(phases))
    reach = np.where(np.array(phases) == PAUSE, 0.6, 0.15)
    milliseconds = _MILLISECONDS[list(phases)] * tempo * (1.0 + reach * (2.0 * drawn - 1.0))
    return np.floor(milliseconds * (RATE / 1000)).astype(np.int64)
