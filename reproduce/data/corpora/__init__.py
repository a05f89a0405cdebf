"""Where utterances come from: one module a corpus, each yielding `Utterance` in corpus order.

A corpus module has one function ``utterances(*, option, ...)`` that takes the options it knows by
name and yields `Utterance`, or `Rejected` for what it found but can't offer. It looks at file
names and transcripts only; audio is decoded later, by ``utterance.audio.load()``, in any process.
To add a corpus: write such a module and give it a line in `CORPORA`. It may also have

- ``hours(*, option, ...) -> float | None``: hours of speech where they can be told without looking
  at the audio, for ``--dry-run``;
- ``provide(*, option, ...) -> bool``: fetch or unpack what is missing; whether anything was;
- ``obtainable(*, option, ...) -> bool``: whether ``provide`` would have something to do.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from reproduce.data.audio import Decoded
from reproduce.errors import RecipeError

SPLITS = ("train", "valid", "test")
DRAWN = "drawn"
"""Begins the split of utterances whose corpus has none, before the share of validation (``drawn
0.1``): train or valid is drawn when it is known which are good."""

CORPORA: dict[str, str] = {
    "librispeech": "reproduce.data.corpora.librispeech",
    "folder": "reproduce.data.corpora.folder",
    "parquet": "reproduce.data.corpora.parquet",
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

    def fetch(self) -> AudioSource:
        """Called before the source is sent to another process: what is read in order is read here.

        Raises:
            reproduce.errors.DataError: the corpus is damaged.
        """
        return self

    def seconds(self) -> float:
        """Length, as cheaply as can be; raises as `load` does."""
        decoded = self.load()
        return len(decoded.samples) / decoded.rate

    def stamp(self) -> str:
        """What changes when the source does, cheap to get (size and time of a file)."""
        return ""


@dataclass(frozen=True)
class Utterance:
    """One utterance of a corpus, not yet decoded.

    Attributes:
        id: unique in the corpus.
        split: ``train``, ``valid``, ``test``, or begins with `DRAWN`.
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
    """Something of the corpus that can't be used, and why.

    Attributes:
        source: as of `Utterance`, or a line of a file.
        id: of the utterance it would have been; None if it is none.
        reason: what is wrong; details, which differ from item to item, behind a colon.
        split: of the utterance, where it is known.
    """

    source: str
    id: str | None
    reason: str
    split: str = field(default="", compare=False)


Item = Utterance | Rejected


def in_parts(parts: Iterable[tuple[str, Iterable[Item]]]) -> Iterator[Item]:
    """Items part by part; an id that an earlier part has too is written ``PART/ID``."""
    owners: dict[str, str] = {}
    for part, items in parts:
        for item in items:
            if isinstance(item, Utterance) and owners.setdefault(item.id, part) != part:
                item = replace(item, id=f"{part}/{item.id}")
            yield item


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
    utterances = _module(name).utterances
    parameters = inspect.signature(utterances).parameters
    known = _known(utterances, name, options)
    own = dict(options.get(name) or {})
    required = {k for k, p in parameters.items() if p.default is inspect.Parameter.empty}
    problems = [f"data.{name}.{key}: unknown option" for key in own if key not in parameters]
    problems += [f"data.{key}: needed by corpus {name}" for key in required - known.keys()]
    if problems:
        raise RecipeError(sorted(problems))
    return Corpus(name, known)


def corpus_hours(name: str, **options: Any) -> float | None:
    """Hours of speech, if the corpus can tell them without looking at the audio."""
    hours = getattr(_module(name), "hours", None)
    return hours(**_known(hours, name, options)) if hours else None


def provide_corpus(name: str, **options: Any) -> bool:
    """Fetch or unpack what is missing of a corpus, as `options` allow; whether anything was.

    Raises:
        DataError: that failed.
    """
    provide = getattr(_module(name), "provide", None)
    return bool(provide(**_known(provide, name, options))) if provide else False


def obtainable_corpus(name: str, **options: Any) -> bool:
    """Whether what is missing of a corpus can be fetched or unpacked, as `options` allow."""
    obtainable = getattr(_module(name), "obtainable", None)
    return bool(obtainable(**_known(obtainable, name, options))) if obtainable else False


def _module(name: str) -> ModuleType:
    if name not in CORPORA:
        known = ", ".join(CORPORA)
        raise RecipeError([f"data.corpus: {name!r} is not a corpus; known: {known}"])
    return importlib.import_module(CORPORA[name])


def _known(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes, and all of the corpus's own."""
    parameters = inspect.signature(function).parameters
    own = dict(options.get(name) or {})
    return {k: v for k, v in options.items() if k in parameters and k != name} | own
