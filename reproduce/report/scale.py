"""How large a recipe's runs are beside the study's: updates, model and data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reproduce.records import Stage
from reproduce.report.caveats import knowing
from reproduce.report.measured import STAGES, Work, flatten, speakers
from reproduce.report.published import Published
from reproduce.report.statistics import FEWEST_SEEDS

STAGE_NAMES: dict[Stage, str] = {"pretrain": "pretraining", "finetune": "fine-tuning"}
FAR_TOO_SMALL = 0.25
"""Runs of less than this share of the study's size in any respect are small: if they know nothing
they say nothing about its claims, else they do at their size."""
STUDY_HOURS = 10.0
"""Training subset of the study."""
STUDY_SPEAKERS = 251
"""Of train-clean-100, from which the subset was drawn (Panayotov et al. 2015)."""


@dataclass(frozen=True)
class Scale:
    """``data``: corpus and hours in words; ``reasons``: in what a stage is under a quarter of the
    study, if it is; ``knowing``: stages of which an arm has seeds enough that know something, as
    far as they are: while no arm has three, as many as the furthest has; ``beside``: all that is
    known of the size, with the study's in brackets."""

    data: str
    reasons: Mapping[Stage, list[str]]
    knowing: Collection[Stage] = ()
    beside: str = ""

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
                f"{self.beside}"
            )
        return (
            f"Far too small to test the study: {'; '.join(reasons)}. Its verdicts show that the "
            f"chain runs, no more.{self.beside}"
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
        _beside(published, work, theirs, ours, hours),
    )


def _beside(
    published: Published,
    work: Work,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    hours: float | None,
) -> str:
    """A sentence with every size that is known; one with where encoders come from, if elsewhere."""
    sizes = []
    for stage in STAGES:
        if (reached := _reached(work, stage)) is not None:
            logged = _logged(published, stage)
            sizes.append(f"{STAGE_NAMES[stage]} of {reached:.0f} updates ({logged:.0f})")
    mine, studys = parameters(ours), parameters(theirs)
    if mine and studys:
        sizes.append(f"encoders of {mine / 1e6:.2g} million parameters ({studys / 1e6:.2g})")
    if hours is not None:
        sizes.append(f"{hours:.2g} h of training data ({STUDY_HOURS:g})")
    count = speakers(work.data).get("train", 0)
    if count:
        sizes.append(f"{count} speaker ids ({STUDY_SPEAKERS} at most)")
    told = f" All of it, the study's in brackets: {'; '.join(sizes)}." if sizes else ""
    if any("/finetune/" in encoder for encoder in _encoders(work)):
        told += (
            " Its fine-tuning goes on from recognizers of another work folder: what they were "
            "fine-tuned on, and that it was with the heads they had, stands behind its numbers too."
        )
    return told


def _encoders(work: Work) -> Iterator[str]:
    """Where the arms with finished fine-tuning runs take their encoders from."""
    section = work.recipe.get("finetune")
    section = section if isinstance(section, Mapping) else {}
    arms = section.get("arms")
    for arm in work.arms("finetune"):
        if work.counted("finetune", arm):
            own = arms.get(arm) if isinstance(arms, Mapping) else None
            own = own if isinstance(own, Mapping) else {}
            yield str(own.get("encoder") or section.get("encoder") or "")


def parameters(recipe: Mapping[str, Any]) -> int:
    """Weights of a flattened recipe's encoder: extractor, projection, positions, transformer and
    the mask's embedding, biases and norms included; not the quantizer. 0: not known."""
    try:
        channels, kernels = recipe["model.conv_channels"], recipe["model.conv_kernels"]
        width, inner = recipe["model.width"], recipe["model.feed_forward"]
        layers, position = recipe["model.layers"], recipe["model.position_kernel"]
        groups, bias = recipe["model.position_groups"], recipe["model.conv_bias"]
        normed = len(channels) if recipe["model.extractor"] == "layer_norm" else 1
        fed = [1, *channels[:-1]]
        extractor = sum(a * b * k for a, b, k in zip(fed, channels, kernels, strict=True))
        extractor += (sum(channels) if bias else 0) + 2 * sum(channels[:normed])
        projection = 2 * channels[-1] + channels[-1] * width + width
        positions = width * width // groups * position + position + width
        layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        return int(extractor + projection + positions + layers * layer + 3 * width)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return 0


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


def _logged(published: Published, stage: Stage) -> float:
    """The last update in the study's logs of a stage."""
    return float(max(c.updates[-1] for (of, _, _), c in published.curves.items() if of == stage))


def _reached(work: Work, stage: Stage) -> float | None:
    """The last update of the longest run of a stage, as logged; None without one."""
    runs = [run for arm in work.arms(stage) for run in work.counted(stage, arm)]
    logged = (run.column(split, "update") for run in runs for split in ("train", "valid"))
    return max((updates[-1] for updates in logged if len(updates)), default=None)


def _updates(published: Published, work: Work, stage: Stage) -> Iterator[str]:
    logged, reached = _logged(published, stage), _reached(work, stage)
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
