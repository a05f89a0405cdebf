"""One family of errors: what was found, where, and what to do next; each with its exit code.

The command line prints ``str(error)`` on stderr and exits with ``error.exit_code``; no traceback
unless ``--debug`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class W2vrepError(Exception):
    """Base of every expected error.

    Args:
        found: what was found, one sentence.
        where: the file, key or run it was found in (may be empty).
        do: what the user can do next (may be empty).
    """

    exit_code = 1

    def __init__(self, found: str, *, where: str = "", do: str = "") -> None:
        self.found, self.where, self.do = found, where, do
        super().__init__(found, where, do)

    def __str__(self) -> str:
        head = f"{self.where}: {self.found}" if self.where else self.found
        return f"{head}\n  {self.do}" if self.do else head

    def __reduce__(self) -> tuple[Any, ...]:  # ranks tell each other of errors
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[W2vrepError], arguments: tuple[str, ...]) -> W2vrepError:
    error = kind.__new__(kind)
    error.args = arguments
    return error


class UsageError(W2vrepError):
    """A command, option or combination of them that can't be carried out."""

    exit_code = 2


class RecipeError(UsageError):
    """Everything wrong with a recipe, at once.

    Args:
        problems: one line a problem, each beginning with its dotted path.
        where: the recipe's name or file.
    """

    def __init__(self, problems: Sequence[str], *, where: str = "", do: str = "") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''}{lines}", where=where, do=do)


class DataError(W2vrepError):
    """A corpus, manifest, audio file, transcript or weight file that can't be used."""

    exit_code = 3


class UnfinishedError(DataError):
    """What a run stands on isn't finished; ``run`` is its name, ``STAGE/ARM/seed-N``."""

    run: str = ""


class MissingCorpusError(DataError):
    """The corpus isn't where it should be; what was prepared from it may still be there."""


class FailedRunsError(W2vrepError):
    """Some run of a grid ended with an error, or with its process; the rest is done first."""


class DivergedError(W2vrepError):
    """Some run of a grid diverged; raised after the rest of the grid is done."""

    exit_code = 4


class ContradictedError(W2vrepError):
    """``report --strict``: a claim is contradicted by the measurements."""

    exit_code = 5


class InterruptedRun(W2vrepError):
    """SIGINT (130) or SIGTERM (143) arrived; the checkpoint is written."""

    def __init__(
        self, found: str, *, where: str = "", do: str = "", signal_number: int = 2
    ) -> None:
        super().__init__(found, where=where, do=do)
        self.exit_code = 128 + signal_number
