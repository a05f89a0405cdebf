"""Why: statements computed from the logs, each made only where the logs hold its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reproduce.records import AT_CHANCE_MARGIN, Stage
from reproduce.report.attribution import paragraph
from reproduce.report.deviations import as_number
from reproduce.report.measured import LOSS, Run, Work, codebooks_of, icsl_of, levels_of
from reproduce.report.published import CHANCE, NEGATIVES, Published
from reproduce.report.statistics import area, span, updates_to_reach

MASKED_BY_WAV2VEC2 = 0.49
"""Share of frames that mask probability 0.65 and span length 10 hide (Baevski et al. 2020)."""
MOSTLY_BLANK = 0.95


@dataclass(frozen=True)
class Finding:
    """One statement about one stage, of one recipe or (empty) of the published data."""

    stage: Stage
    recipe: str
    topic: str
    text: str


def findings(published: Published, works: Sequence[Work]) -> list[Finding]:
    """Everything the numbers support, the published data first."""
    found = [_published_chance(published)]
    for work in works:
        for stage, topic, state in _STATEMENTS:
            if text := state(published, work):
                found.append(Finding(stage, work.name, topic, text))
    return found


def _published_chance(published: Published) -> Finding:
    losses = [n.value for (stage, _), n in published.numbers.items() if stage == "pretrain"]
    under = sum(loss < CHANCE for loss in losses)
    text = (
        f"A model that knows nothing scores ln({NEGATIVES + 1}) = {CHANCE:.4f} nats if no negative "
        f"is removed, and less if some are. All {len(losses)} published losses lie within "
        f"{published.chance_gap:.4f} nats of it ({under} under it, {len(losses) - under} over it), "
        f"well inside the {AT_CHANCE_MARGIN} nats within which this report calls a run at chance."
    )
    return Finding("pretrain", "", "chance", text)


# ------------------------------------------------------------------------------------ pretraining


def _chance(published: Published, work: Work) -> str:
    pairs = [
        (loss, chance)
        for run in _counted(work, "pretrain")
        if (loss := run.final("valid", "contrastive_loss")) is not None
        and (chance := run.final("valid", "chance_loss")) is not None
    ]
    if not pairs:
        return ""
    skills = [chance - loss for loss, chance in pairs]
    level = np.mean([chance for _, chance in pairs])
    at_chance = sum(abs(skill) <= AT_CHANCE_MARGIN for skill in skills)
    kept = _finals(work, "pretrain", "valid", "negatives_kept")
    text = f"Chance on validation, as logged, is {level:.4f} nats"
    text += f" ({np.mean(kept):.1f} negatives kept a frame)" if kept else ""
    text += f", against ln({NEGATIVES + 1}) = {CHANCE:.4f}. "
    text += f"{at_chance} of {len(pairs)} finished runs end within {AT_CHANCE_MARGIN} nats of it, "
    text += f"{sum(skill < -AT_CHANCE_MARGIN for skill in skills)} worse than it by more; "
    text += f"skill (chance less loss) is {span(skills, 'z.3f')} nats"
    speech = [
        chance - loss
        for run in _counted(work, "pretrain")
        if (loss := run.final("valid", "speech_loss")) is not None
        and (chance := run.final("valid", "speech_chance")) is not None
    ]
    return text + (f", over frames of speech alone {span(speech, 'z.3f')}." if speech else ".")


def _mask(published: Published, work: Work) -> str:
    curves = [run.curve("train", "mask_fraction") for run in _counted(work, "pretrain")]
    values = np.concatenate([100 * curve.values for curve in curves] or [np.empty(0)])
    if not len(values):
        return ""
    mean = np.mean([100 * curve.values.mean() for curve in curves if len(curve)])
    apart = span(list(values), ".1f")
    return (
        f"{mean:.1f} % of the frames are masked in training, {mean / 100 / MASKED_BY_WAV2VEC2:.2f} "
        f"of wav2vec 2.0's {100 * MASKED_BY_WAV2VEC2:.0f} %"
        + (f"; {apart} % from one logged window to another." if "to" in apart else ".")
    )


def _icsl(published: Published, work: Work) -> str:
    """Weight, share of the gradient and change of ICSL, by number of codebooks."""
    groups: dict[int, list[Run]] = {}
    for arm in work.arms("pretrain"):
        size = codebooks_of(arm, work.overrides("pretrain", arm)) or 0
        for run in work.counted("pretrain", arm):
            weight = run.curve("train", "icsl_effective_weight")
            if len(weight) and weight.values.max() > 0:
                groups.setdefault(size, []).append(run)
    texts: dict[tuple[str, str], list[str]] = {}
    for size, runs in sorted(groups.items()):
        weights = [run.curve("train", "icsl_effective_weight").values for run in runs]
        text = ""
        if shares := _run_means(runs, "train", "icsl_gradient_share"):
            percent = span([100 * share for share in shares], ".2g")
            text += f", sending {percent} % of the codebooks' gradient norm"
        if ends := _first_last(runs, "train", "icsl"):
            text += f", its value going from {ends[0]:.4f} to {ends[1]:.4f}"
        known = span(list(np.concatenate(weights)), ".2g")
        texts.setdefault((known, text), []).append(str(size or "unknown"))
    if not texts:
        return ""
    parts = (f"{w} with {', '.join(sizes)} codebooks{t}" for (w, t), sizes in texts.items())
    return f"Its weight beside the mean loss per frame is {'; '.join(parts)}."


def _use(published: Published, work: Work) -> str:
    runs = list(_counted(work, "pretrain"))
    shares = [run.codes.in_use() for run in runs if "code_counts" in run.codes.arrays]
    used = np.concatenate(shares) if shares else np.empty(0)
    used = used[np.isfinite(used)]
    if not len(used):
        return ""
    return (
        f"At the end a codebook has {span([100 * float(u) for u in used], '.2g')} % of its "
        f"entries in use on validation (exp(entropy)/V of {len(used)} codebooks)."
    )


def _shared(published: Published, work: Work) -> str:
    """What pairs of codebooks share, with and without ICSL."""
    groups: dict[bool, list[float]] = {True: [], False: []}
    for arm in work.arms("pretrain"):
        icsl = icsl_of(arm, work.overrides("pretrain", arm))
        for run in work.counted("pretrain", arm):
            nmi, accident = run.codes.pair_mean("nmi"), run.codes.pair_mean("nmi_baseline")
            if icsl is not None and nmi is not None and accident is not None:
                groups[icsl].append(nmi - accident)
    if not groups[True] or not groups[False]:
        return ""
    return (
        "The codes of two codebooks share, in normalized mutual information less its permutation "
        f"baseline, {span(groups[True], 'z.3f')} with ICSL and {span(groups[False], 'z.3f')} "
        "without it."
    )


# ------------------------------------------------------------------------------------ fine-tuning


def _blanks(published: Published, work: Work) -> str:
    blank = _finals(work, "finetune", "valid", "blank_rate")
    wer = _finals(work, "finetune", "valid", "wer")
    if not blank:
        return ""
    mostly = sum(rate >= MOSTLY_BLANK for rate in blank)
    text = (
        f"The blank rate on validation is {span(blank, '.3f')}; {mostly} of {len(blank)} "
        f"finished runs output blanks for at least {100 * MOSTLY_BLANK:.0f} % of the frames."
    )
    if wer:
        logged = span(list(published.word_error_rates.values()), ".4f")
        text += f" The word error rate is {span(wer, '.3f')}; the study logged {logged}."
    return text


def _window(published: Published, work: Work) -> str:
    gaps = [
        valid - train
        for run in _counted(work, "finetune")
        if (valid := run.final("valid", "ctc_loss")) is not None
        and (train := run.final("train", "ctc_loss")) is not None
    ]
    if not gaps:
        return ""
    logged = "; ".join(
        f"{curve.values[-1] - published.curves['finetune', 'train', arm].values[-1]:.2f} ({arm})"
        for (stage, split, arm), curve in published.curves.items()
        if (stage, split) == ("finetune", "valid")
    )
    return (
        f"The validation loss less the last training window, which is what the study printed, is "
        f"{span(gaps, 'z.2f')} nats; in the study's logs it was {logged}."
    )


def _levels(published: Published, work: Work) -> str:
    """What the last levels of the deepest quantizer still do."""
    depth = {
        arm: levels
        for arm in work.arms("finetune")
        if (levels := levels_of(arm, work.overrides("finetune", arm)) or 0) > 1
        and any("mse" in run.codes.arrays for run in work.counted("finetune", arm))
    }
    if not depth:
        return ""
    arm = max(depth, key=lambda name: depth[name])
    arrays = [run.codes.arrays for run in work.counted("finetune", arm)]
    errors = np.mean([a["mse"] for a in arrays if "mse" in a and len(a["mse"]) == depth[arm]], 0)
    if np.ndim(errors) != 1 or not np.isfinite(errors).all() or errors[0] <= 0:
        return ""
    half = -(-depth[arm] // 2)
    return (
        f"In {arm} level 1 leaves a mean squared residual of {errors[0]:.3g}, level {half} "
        f"{100 * errors[half - 1] / errors[0]:.2g} % of that and level {depth[arm]} "
        f"{100 * errors[-1] / errors[0]:.2g} %."
    )


def _bits(published: Published, work: Work) -> str:
    """What the codes of a frame take, what error they leave, and what that costs in CTC."""
    parts = []
    for arm in work.arms("finetune"):
        runs = [run for run in work.counted("finetune", arm) if "mse" in run.codes.arrays]
        bits = [float(run.codes.bits().sum()) for run in runs]
        if not bits or not np.isfinite(bits).all():
            continue
        errors = [float(run.codes.arrays["mse"][-1]) for run in runs]
        text = f"{arm} {np.mean(bits):.1f} bits, error {np.mean(errors):.3g}"
        losses = work.values("finetune", arm, "valid", "ctc_loss")
        parts.append(text + (f", CTC {np.mean(losses):.2f}" if losses else ""))
    if not parts:
        return ""
    widths = {run.codes.width for run in _counted(work, "finetune") if run.codes.width}
    floats = f" (as float32 numbers: {32 * max(widths)} bits)" if widths else ""
    plain = work.values("finetune", "no_rvq", "valid", "ctc_loss")
    return (
        f"What the codes of a frame take{floats}, by the entropy of each level's codes, the mean "
        f"squared error that is left, and CTC on validation: {'; '.join(parts)}"
        + (f"; without RVQ CTC {np.mean(plain):.2f}." if plain else ".")
    )


def _zeroed(published: Published, work: Work) -> str:
    zeroed = _means(work, "finetune", "train", "zeroed")
    if not zeroed or max(zeroed) <= 0:
        return ""
    return "Some training utterances are shorter than their target and count as zero loss."


# ------------------------------------------------------------------------------------------- both


def _rate(work: Work, stage: Stage) -> str:
    runs = [run for run in _counted(work, stage) if len(run.curve("train", "learning_rate"))]
    if not runs:
        return ""
    rates = [run.curve("train", "learning_rate") for run in runs]
    peak = max(rate.values.max() for rate in rates)
    longest = max(rates, key=lambda rate: rate.updates[-1])
    last, end = longest.values[-1], longest.updates[-1]
    section = work.recipe.get(stage)
    optimizer = section.get("optimizer") if isinstance(section, Mapping) else None
    planned = as_number(optimizer.get("learning_rate")) if isinstance(optimizer, Mapping) else None
    text = f"The learning rate reached {peak:.3g}"
    text += f", {peak / planned:.2f} of the recipe's {planned:.3g}," if planned else ""
    return f"{text} and was {last:.3g} at the last logged update ({end:.0f})."


_STATEMENTS: tuple[tuple[Stage, str, Callable[[Published, Work], str]], ...] = (
    ("pretrain", "chance", _chance),
    ("pretrain", "masking", _mask),
    ("pretrain", "ICSL", _icsl),
    ("pretrain", "use of codebooks", _use),
    ("pretrain", "redundancy", _shared),
    ("pretrain", "attribution", paragraph),
    ("pretrain", "learning rate", lambda p, w: _rate(w, "pretrain")),
    ("finetune", "blanks", _blanks),
    ("finetune", "what was printed", _window),
    ("finetune", "RVQ levels", _levels),
    ("finetune", "compactness", _bits),
    ("finetune", "zeroed losses", _zeroed),
    ("finetune", "learning rate", lambda p, w: _rate(w, "finetune")),
)


def diagnostics(work: Work, stage: Stage) -> tuple[list[str], list[list[str]]]:
    """Headings and one row an arm of what explains its loss; empty columns are left out.

    Means over finished runs; "a to b" is from the first logged point to the last.
    """
    arms = [arm for arm in work.arms(stage) if work.counted(stage, arm)]
    columns = [(heading, [show(work.counted(stage, arm)) for arm in arms])
               for heading, show in (*_speed(work, stage, arms), *_DIAGNOSTICS[stage])]  # fmt: skip
    columns = [(heading, cells) for heading, cells in columns if any(cells)]
    rows = [[arm, *(cells[k] for _, cells in columns)] for k, arm in enumerate(arms)]
    return ["arm", *(heading for heading, _ in columns)], rows


def _speed(work: Work, stage: Stage, arms: Sequence[str]) -> list[tuple[str, Show]]:
    """How fast arms learn: area under their curves, and updates to a loss that all runs reach.

    That loss is the final one of the run that ends highest.
    """
    loss = LOSS[stage]
    finals = [value for arm in arms for value in work.values(stage, arm, "valid", loss)]
    columns = [
        (f"area, {name}", _height(split, loss))
        for name, split in (("training", "train"), ("validation", "valid"))
    ]
    if finals:
        level = max(finals)
        columns.append((f"updates to {level:.4g} in validation", _reach(loss, level)))
    return columns


Show = Callable[[Sequence[Run]], str]


def _mean(split: str, column: str, form: str, factor: float = 1.0) -> Show:
    def show(runs: Sequence[Run]) -> str:
        values = _run_means(runs, split, column)
        return f"{factor * float(np.mean(values)):{form}}" if values else ""

    return show


def _height(split: str, column: str) -> Show:
    """The area under a curve divided by its width, in nats."""

    def show(runs: Sequence[Run]) -> str:
        curves = [curve for run in runs if len(curve := run.curve(split, column)) > 1]
        heights = [area(curve, curve.updates[0], curve.updates[-1]) for curve in curves]
        return f"{np.mean(heights):.4f}" if heights else ""

    return show


def _reach(column: str, level: float) -> Show:
    """Updates to a validation loss, averaged over runs."""

    def show(runs: Sequence[Run]) -> str:
        updates = [updates_to_reach(run.curve("valid", column), level) for run in runs]
        there = [update for update in updates if np.isfinite(update)]
        return f"{np.mean(there):.0f}" if there else ""

    return show


def _change(split: str, column: str, form: str) -> Show:
    def show(runs: Sequence[Run]) -> str:
        ends = _first_last(runs, split, column)
        return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else ""

    return show


def _last(column: str, form: str) -> Show:
    def show(runs: Sequence[Run]) -> str:
        values = [v for run in runs if (v := run.final("valid", column)) is not None]
        return f"{np.mean(values):{form}}" if values else ""

    return show


_DIAGNOSTICS: dict[Stage, tuple[tuple[str, Show], ...]] = {
    "pretrain": (
        ("kept negatives", _mean("train", "negatives_kept", ".1f")),
        ("masked frames, %", _mean("train", "mask_fraction", ".1f", 100)),
        ("effective ICSL weight", _mean("train", "icsl_effective_weight", ".2g")),
        ("ICSL's share of gradient, %", _mean("train", "icsl_gradient_share", ".2g", 100)),
        ("ICSL value", _change("train", "icsl", ".4f")),
        ("mutual information of codes", _change("valid", "code_nmi", "z.3f")),
        ("perplexity", _change("valid", "perplexity", ".0f")),
    ),
    "finetune": (
        ("blank rate", _change("valid", "blank_rate", ".3f")),
        ("WER", _change("valid", "wer", ".3f")),
        ("last level: residual error", _last("rvq_mse", ".3g")),
        ("perplexity", _last("rvq_perplexity", ".1f")),
        ("dead codes", _last("rvq_dead_codes", ".0f")),
        ("zeroed losses a window", _mean("train", "zeroed", ".2g")),
    ),
}


def _counted(work: Work, stage: Stage) -> Iterator[Run]:
    return (run for arm in work.arms(stage) for run in work.counted(stage, arm))


def _finals(work: Work, stage: Stage, split: str, column: str) -> list[float]:
    found = (run.final(split, column) for run in _counted(work, stage))
    return [value for value in found if value is not None]


def _means(work: Work, stage: Stage, split: str, column: str) -> list[float]:
    return _run_means(_counted(work, stage), split, column)


def _run_means(runs: Iterator[Run] | Sequence[Run], split: str, column: str) -> list[float]:
    curves = (run.curve(split, column) for run in runs)
    return [float(curve.values.mean()) for curve in curves if len(curve)]


def _first_last(runs: Sequence[Run], split: str, column: str) -> tuple[float, float] | None:
    """Means over runs of the first and last value; None under two points."""
    curves = [curve for run in runs if len(curve := run.curve(split, column)) > 1]
    if not curves:
        return None
    first = np.mean([curve.values[0] for curve in curves])
    return float(first), float(np.mean([curve.values[-1] for curve in curves]))
