"""``--dry-run``: what a recipe would do. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from reproduce.errors import DataError
from reproduce.recipe.schema import Finetune, Recipe, Stage
from reproduce.records import WorkFolder
from reproduce.tasks.corpus import size_line

if TYPE_CHECKING:
    from torch import Tensor


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
    if "prepare" in stages:
        yield f"  size    {size_line(recipe, work)}"
    for name in stages:
        if name == "prepare":
            continue
        planned = recipe.pretrain.arms if name == "pretrain" else recipe.finetune.arms
        chosen = list(arms if arms is not None else planned)
        section_of = recipe.pretrain_arm if name == "pretrain" else recipe.finetune_arm
        yield f"{name:9} {len(chosen)} arms x {len(seeds)} seeds = {len(chosen) * len(seeds)} runs"
        yield f"  arms    {', '.join(chosen)}"
        yield f"  seeds   {', '.join(map(str, seeds))}"
        updates: dict[str, list[str]] = {}
        for arm in chosen:
            updates.setdefault(_updates(recipe, work, section_of(arm)), []).append(arm)
        for text, having in updates.items():
            yield f"  updates {text}" + (f" ({', '.join(having)})" if len(updates) > 1 else "")
        parameters = _pretrained if name == "pretrain" else _finetuned
        yield from parameters(recipe, chosen)


def _updates(recipe: Recipe, work: WorkFolder, section: Stage) -> str:
    return f"{section.updates} of {_audio(recipe, work, section)}"


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


def _pretrained(recipe: Recipe, arms: Sequence[str]) -> Iterator[str]:
    import torch

    from reproduce.tasks.pretraining import build_model

    for arm in arms:
        with torch.device("meta"):
            model = build_model(recipe.model, recipe.pretrain_arm(arm), 0)
        yield f"  {arm:16} {_count(model.parameters())}"


def _finetuned(recipe: Recipe, arms: Sequence[str]) -> Iterator[str]:
    """Encoders as far as the recipe knows them, and each arm's codebooks."""
    for arm in arms:
        section = recipe.finetune_arm(arm)
        rvq = section.rvq
        codes = f", {rvq.levels} x {rvq.codes} codes" if rvq.levels else ""
        yield f"  {arm:16} {_encoder(recipe, section)}, trained: {section.train}{codes}"


def _encoder(recipe: Recipe, section: Finetune) -> str:
    if section.encoder.partition("/")[0] not in recipe.pretrain.arms:
        return f"encoder {section.encoder}"
    import torch

    from reproduce.model.encoder import Encoder, EncoderConfig

    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**recipe.model.model_dump()))
    return f"encoder {section.encoder} of {_count(encoder.parameters())}"


def _count(parameters: Iterable[Tensor]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M parameters"
