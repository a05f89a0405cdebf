"""Where utterances come from: one module a corpus, each yielding `Utterance` in corpus order.

A corpus module has one function ``utterances(*, option, ...)`` that takes the options it knows by
name and yields `Utterance`, or `Rejected` for what it found but can't offer. It looks at file
names and transcripts only; audio is decoded later, by ``utterance.audio.load()``, in any process.
To add a corpus: write such a module and give it a line in `CORPORA`.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reproduce.data.audio import Decoded
from reproduce.errors import RecipeError

SPLITS = ("train", "valid", "test")

CORPORA: dict[str, str] = {
    "librispeech": "reproduce.data.corpora.librispeech",
    "folder": "reproduce.data.corpora.folder",
    "synthetic": "reproduce.data.corpora.synthetic",
}
"""Corpus name -> module, imported when it is read."""


class AudioSource(ABC):
    """Where an utterance's audio comes from: small, picklable, decoded on demand."""

    @abstractmethod
    def load(self) -> Decoded:
        """Decode.

        Raises:
            reproduce.data.audio.AudioError: the audio can't be used; its message is the reason.
            OSError: the file can't be read.
        """

    def stamp(self) -> str:
        """What changes when the source does, cheap to get (size and time of a file)."""
        return ""


@dataclass(frozen=True)
class Utterance:
    """One utterance of a corpus, not yet decoded.

    Attributes:
        id: unique in the corpus.
        split: ``train``, ``valid`` or ``test``.
        speaker: empty where unknown.
        text: the transcript as the corpus has it.
        source: path relative to the corpus root, or a name such as ``synthetic:SEED/...``.
        audio: decodes it.
    """

    id: str
    split: str
    speaker: str
    text: str
    source: str
    audio: AudioSource


@dataclass(frozen=True)
class Rejected:
    """Something of the corpus that can't be used, and why."""

    source: str
    id: str | None
    reason: str


Item = Utterance | Rejected


@dataclass(frozen=True)
class Corpus:
    """A corpus with its options; each ``iter()`` reads it anew, in the same order."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Item]:
        utterances = importlib.import_module(CORPORA[self.name]).utterances
        iterator: Iterator[Item] = utterances(**self.options)
        return iterator


def read_corpus(name: str, **options: Any) -> Corpus:
    """The corpus called `name`, with those of `options` that it knows.

    Options are the recipe's data section, flat; a mapping under the corpus's own name (such as
    ``synthetic={"hours": 1}``) holds the options of that corpus alone and must be known to it.

    Raises:
        RecipeError: an unknown corpus, an unknown option under its own name, or a missing one.
    """
    if name not in CORPORA:
        known = ", ".join(CORPORA)
        raise RecipeError([f"data.corpus: {name!r} is not a corpus; known: {known}"])
    parameters = inspect.signature(importlib.import_module(CORPORA[name]).utterances).parameters
    own = dict(options.get(name) or {})
    known_options = {k: v for k, v in options.items() if k in parameters and k != name} | own
    required = {k for k, p in parameters.items() if p.default is inspect.Parameter.empty}
    problems = [f"data.{name}.{key}: unknown option" for key in own if key not in parameters]
    problems += [f"data.{key}: needed by corpus {name}" for key in required - known_options.keys()]
    if problems:
        raise RecipeError(sorted(problems))
    return Corpus(name, known_options)
