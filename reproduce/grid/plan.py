"""``--dry-run``: what a recipe would do. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from reproduce.data.disk import size
from reproduce.errors import DataError
from reproduce.recipe.named_runs import pretrained_arm
from reproduce.recipe.schema import Finetune, Recipe, Stage
from reproduce.records import WorkFolder
from reproduce.tasks.corpus import size_line

if TYPE_CHECKING:
    from torch.nn import Module


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
        hours: list[float | None] = []
        for arm in chosen:
            section = section_of(arm)
            text, audio = _updates(recipe, work, section)
            updates.setdefault(text, []).append(arm)
            hours.append(None if audio is None else audio * section.updates * len(seeds))
        for text, having in updates.items():
            yield f"  updates {text}" + (f" ({', '.join(having)})" if len(updates) > 1 else "")
        total = sum(section_of(arm).updates for arm in chosen) * len(seeds)
        heard = "" if None in hours else f", {sum(filter(None, hours)):.1f} hours of audio"
        yield f"  in all  {total} updates{heard}"
        parameters = _pretrained if name == "pretrain" else _finetuned
        yield from parameters(recipe, chosen)
        yield from _disk(recipe, name, chosen, len(seeds))


def _updates(recipe: Recipe, work: WorkFolder, section: Stage) -> tuple[str, float | None]:
    """A run's updates in words, and the hours of audio of one, exact or at most."""
    count = section.batch_size * section.accumulation
    text = f"{section.updates} of {section.batch_size} x {section.accumulation} utterances"
    crop = getattr(section, "crop_seconds", None)
    mean = _mean_seconds(recipe, work, section, crop)
    seconds = mean if mean is not None else crop or section.max_seconds
    if seconds is None:
        return f"{text}; hours of audio known after w2vrep prepare", None
    hours = count * seconds / 3600
    bound = "at most " if mean is None else ""
    run = hours * section.updates
    return f"{text}, {bound}{hours:.4f} hours of audio each, {run:.2f} a run", hours


def _disk(recipe: Recipe, stage: str, arms: Sequence[str], seeds: int) -> Iterator[str]:
    """What models and checkpoints take, as far as the recipe knows the encoder."""
    import torch

    from reproduce.tasks.pretraining import build_model

    largest, models = 0, 0
    for arm in arms:
        with torch.device("meta"):
            if stage == "pretrain":
                parameters = _number(build_model(recipe.model, recipe.pretrain_arm(arm), 0))
                trained = parameters
            else:
                section = recipe.finetune_arm(arm)
                if not _encoder_is_ours(recipe, section):
                    return
                parameters = _number(_own_encoder(recipe))
                trained = 0 if section.train == "head" else parameters
        models += 4 * parameters * seeds
        # Weights and two moments, the newest two; a frozen encoder isn't among them.
        largest = max(largest, 2 * 3 * 4 * trained)
    yield f"  disk    models {size(models)} in all; checkpoints {size(largest)} a run in training"


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
    seconds = rows.array("seconds")
    if crop is not None:
        seconds = seconds.clip(max=crop)
    return float(seconds.mean()) if len(seconds) else None


def _pretrained(recipe: Recipe, arms: Sequence[str]) -> Iterator[str]:
    import torch

    from reproduce.tasks.pretraining import build_model

    for arm in arms:
        with torch.device("meta"):
            model = build_model(recipe.model, recipe.pretrain_arm(arm), 0)
        yield f"  {arm:16} {_count(model)}"


def _finetuned(recipe: Recipe, arms: Sequence[str]) -> Iterator[str]:
    """Encoders as far as the recipe knows them, and each arm's codebooks."""
    for arm in arms:
        section = recipe.finetune_arm(arm)
        rvq = section.rvq
        codes = f", {rvq.levels} x {rvq.codes} codes" if rvq.levels else ""
        yield f"  {arm:16} {_encoder(recipe, section)}, trained: {section.train}{codes}"


def _encoder(recipe: Recipe, section: Finetune) -> str:
    if not _encoder_is_ours(recipe, section):
        return f"encoder {section.encoder}"
    return f"encoder {section.encoder} of {_count(_own_encoder(recipe))}"


def _encoder_is_ours(recipe: Recipe, section: Finetune) -> bool:
    """Whether this recipe pretrains an arm's encoder, be it fine-tuned in between."""
    return pretrained_arm(recipe, section) is not None


def _own_encoder(recipe: Recipe) -> Module:
    """The encoder that this recipe pretrains, without weights."""
    import torch

    from reproduce.model.encoder import Encoder, EncoderConfig

    with torch.device("meta"):
        return Encoder(EncoderConfig(**recipe.model.model_dump()))


def _number(model: Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count(model: Module) -> str:
    return f"{_number(model) / 1e6:.2f} M parameters"
