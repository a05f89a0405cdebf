"""How large a recipe's runs are beside the study's: updates, model and data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reproduce.records import Stage
from reproduce.report.caveats import knowing
from reproduce.report.measured import STAGES, Work, flatten
from reproduce.report.published import Published
from reproduce.report.statistics import FEWEST_SEEDS

STAGE_NAMES: dict[Stage, str] = {"pretrain": "pretraining", "finetune": "fine-tuning"}
FAR_TOO_SMALL = 0.25
"""Runs of less than this share of the study's size in any respect are small: if they know nothing
they say nothing about its claims, else they do at their size."""
STUDY_HOURS = 10.0
"""Training subset of the study."""


@dataclass(frozen=True)
class Scale:
    """``data``: corpus and hours in words; ``reasons``: in what a stage is under a quarter of the
    study, if it is; ``knowing``: stages of which an arm has seeds enough that know something, as
    far as they are: while no arm has three, as many as the furthest has."""

    data: str
    reasons: Mapping[Stage, list[str]]
    knowing: Collection[Stage] = ()

    def caveat(self, stages: Collection[Stage]) -> str:
        """The short form, for a claim about some stages; empty if they are large enough."""
        if not any(self.reasons[of] for of in stages):
            return ""
        known = all(of in self.knowing for of in stages)
        return "at this size" if known else "far too small to test it"

    @property
    def text(self) -> str:
        """The long form, for a recipe; empty if nothing is too small."""
        reasons = dict.fromkeys(reason for stage in STAGES for reason in self.reasons[stage])
        if not reasons:
            return ""
        if self.knowing:
            stages = " and ".join(STAGE_NAMES[of] for of in STAGES if of in self.knowing)
            return (
                f"Runs that know something ({stages}) test the claims at their own size, which is "
                f"not the study's: {'; '.join(reasons)}. Signs of differences may hold beyond it; "
                "their sizes, the losses and the number of updates they take can't be carried over."
            )
        return (
            f"Far too small to test the study: {'; '.join(reasons)}. Its verdicts show that the "
            "chain runs, no more."
        )


def scale_of(published: Published, work: Work, as_run: Mapping[str, Any]) -> Scale:
    """A recipe's runs against the study's logs and the resolved ``as-run`` recipe."""
    theirs, ours = dict(flatten(as_run)), dict(flatten(work.recipe))
    corpus, hours = ours.get("data.corpus"), training_hours(work)
    known = [f"corpus {corpus}"] if corpus else []
    known += [f"{hours:.2g} h for training"] if hours is not None else []
    return Scale(
        ", ".join(known) or "corpus and hours unknown",
        {
            stage: [
                *_updates(published, work, stage),
                *(_model(theirs, ours) if _own_encoder(work, stage) else ()),
                *_data(corpus, hours),
            ]
            if any(work.counted(stage, arm) for arm in work.arms(stage))
            else []
            for stage in STAGES
        },
        [stage for stage in STAGES if _knows(work, stage)],
    )


def _knows(work: Work, stage: Stage) -> bool:
    arms = [work.counted(stage, arm) for arm in work.arms(stage)]
    enough = min(FEWEST_SEEDS, max(map(len, arms), default=0))
    return enough > 0 and any(knowing(runs) >= enough for runs in arms)


def training_hours(work: Work) -> float | None:
    """Hours of the training subset that the recipe names, as prepared; None if that isn't known."""
    section, subsets = work.recipe.get("data"), work.data.get("subsets")
    name = section.get("subset") if isinstance(section, Mapping) else None
    subset = subsets.get(name) if isinstance(subsets, Mapping) else None
    hours = subset.get("hours") if isinstance(subset, Mapping) else None
    return float(hours) if isinstance(hours, int | float) else None


def _updates(published: Published, work: Work, stage: Stage) -> Iterator[str]:
    logged = max(c.updates[-1] for (of, _, _), c in published.curves.items() if of == stage)
    runs = (run for arm in work.arms(stage) for run in work.counted(stage, arm))
    reached = max((u[-1] for run in runs if len(u := run.column("train", "update"))), default=None)
    if reached is not None and reached < FAR_TOO_SMALL * logged:
        yield (
            f"{STAGE_NAMES[stage]} made {reached:.0f} updates where the study's logs reach "
            f"{logged:.0f} ({100 * reached / logged:.2g} %)"
        )


def _model(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """The transformer's weights grow with its layers and the square of its width."""
    keys = ("model.layers", "model.width")
    layers, width, study_layers, study_width = (
        value if isinstance(value := tree.get(key), int) else 0
        for tree in (ours, theirs)
        for key in keys
    )
    if not (layers and width and study_layers and study_width):
        return
    share = layers * width**2 / (study_layers * study_width**2)
    if share < FAR_TOO_SMALL:
        yield (
            f"the model has {layers} layers of width {width}, not {study_layers} of {study_width}"
        )


def _own_encoder(work: Work, stage: Stage) -> bool:
    """Whether a stage's encoder is of the recipe's own size: pretrained here, not brought along."""
    if stage == "pretrain":
        return True
    section = work.recipe.get("finetune")
    section = section if isinstance(section, Mapping) else {}
    arms = dict(section.get("arms") or {})
    first, *rest = str(section.get("encoder")).split("/")
    while first == "finetune" and rest and rest[0] in arms:  # fine-tuned before, by another arm
        own = arms.pop(rest[0])
        first, *rest = str((own or {}).get("encoder", "")).split("/")
    return first in work.arms("pretrain")


def _data(corpus: Any, hours: float | None) -> Iterator[str]:
    if corpus == "synthetic":
        yield "the corpus is synthetic, not speech"
    if hours is not None and hours < FAR_TOO_SMALL * STUDY_HOURS:
        yield f"{hours:.2g} h of training data, not {STUDY_HOURS:g} h"
