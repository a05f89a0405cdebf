"""Where a recipe differs from what the study ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reproduce.report.measured import Work, flatten


@dataclass(frozen=True)
class Deviation:
    """A recipe key whose value isn't the one of the ``as-run`` recipe."""

    recipe: str
    key: str
    as_run: str
    here: str


def deviations(work: Work, as_run: Mapping[str, Any]) -> list[Deviation]:
    """Keys of a resolved recipe that differ from those of the resolved ``as-run``.

    Names, places on the machine and what can't change a number are left out; so are keys that only
    one of the two has, but for arms. ``log_every`` stays: it is the training window's length.
    """
    theirs, ours = dict(flatten(as_run)), dict(flatten(work.recipe))
    found = []
    for key in dict.fromkeys([*theirs, *ours]):
        if key.startswith(_NOT_COMPARED) or (key.startswith("data.synthetic.")):
            continue
        arm = ".arms." in key
        if not arm and not (key in theirs and key in ours):
            continue
        there, here = _shown(theirs.get(key)), _shown(ours.get(key))
        if there != here and work.recipe:
            found.append(Deviation(work.name, key, there, here))
    return found


_NOT_COMPARED = (
    "name", "description", "data.root", "data.jobs", "data.transcripts", "data.download",
    "compute.device",
    "compute.threads", "compute.compile", "pretrain.checkpoint_every", "finetune.checkpoint_every",
)  # fmt: skip


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value) or "-"
    number = as_number(value)
    return f"{number:g}" if number is not None else str(value)


def as_number(value: Any) -> float | None:
    """A recipe value as a number; None if it isn't one (YAML reads 1e-4 as text)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
