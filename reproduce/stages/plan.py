"""``--dry-run``: what a recipe would do. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reproduce.errors import DataError
from reproduce.recipe.schema import Finetune, Recipe, Stage
from reproduce.records import WorkFolder


def plan_lines(
    recipe: Recipe,
    work: WorkFolder,
    stages: Sequence[str],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[str]:
    """The resolved plan: data, arms, seeds, updates, audio an update, parameters."""
    seeds = list(seeds if seeds is not None else recipe.seeds)
    data = recipe.data
    where = f", root {data.root}" if data.root else ""
    yield f"recipe    {recipe.name}"
    yield f"work      {work.root}"
    yield f"data      corpus {data.corpus}{where}, subset {data.subset}"
    for name in stages:
        section = recipe.pretrain if name == "pretrain" else recipe.finetune
        chosen = list(arms if arms is not None else section.arms)
        yield f"{name:9} {len(chosen)} arms x {len(seeds)} seeds = {len(chosen) * len(seeds)} runs"
        yield f"  arms    {', '.join(chosen)}"
        yield f"  seeds   {', '.join(map(str, seeds))}"
        yield f"  updates {section.updates} of {_audio(recipe, work, section)}"
        yield from _parameters(recipe, name, chosen)


def _audio(recipe: Recipe, work: WorkFolder, section: Stage) -> str:
    count = section.batch_size * section.accumulation
    utterances = f"{section.batch_size} x {section.accumulation} utterances"
    crop = getattr(section, "crop_seconds", None)
    mean = _mean_seconds(recipe, work, section, crop)
    if mean is not None:
        return f"{utterances}, {count * mean / 3600:.4f} hours of audio"
    longest = crop or section.max_seconds
    if longest is None:
        return f"{utterances}; hours of audio known after w2vrep prepare"
    return f"{utterances}, at most {count * longest / 3600:.4f} hours of audio"


def _mean_seconds(
    recipe: Recipe, work: WorkFolder, section: Stage, crop: float | None
) -> float | None:
    from reproduce.data.manifest import Manifest

    if not work.summary.exists():
        return None
    try:
        rows = Manifest.read(work.data, verify=False).select(
            split="train",
            subset=recipe.data.subset,
            min_seconds=section.min_seconds or None,
            max_seconds=section.max_seconds,
        )
    except DataError:
        return None
    seconds = rows["seconds"] if crop is None else rows["seconds"].clip(upper=crop)
    return float(seconds.mean()) if len(seconds) else None


def _parameters(recipe: Recipe, stage: str, arms: Sequence[str]) -> Iterator[str]:
    if stage == "finetune":
        section: Finetune = recipe.finetune
        yield f"  encoder {section.encoder}, trained: {section.train}"
        return
    import torch

    from reproduce.stages.pretrain import build_model

    for arm in arms:
        with torch.device("meta"):
            model = build_model(recipe.model, recipe.pretrain_arm(arm), 0)
        count = sum(parameter.numel() for parameter in model.parameters())
        yield f"  {arm:16} {count / 1e6:.2f} M parameters"
