"""Where a recipe's encoder comes from, and what tells it from another one of the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from reproduce.errors import DataError, DivergedError, UnfinishedError, W2vrepError
from reproduce.model.folders import CONFIG, PICKLED, SAFETENSORS, wants_normalized
from reproduce.model.interop import HubName, encoder_source, load_encoder
from reproduce.recipe.named_runs import named_run
from reproduce.recipe.schema import Recipe
from reproduce.records import RunFolder, WorkFolder
from reproduce.tasks.context import read_record
from reproduce.training.distributed import Ranks


def check_encoders(recipe: Recipe, ranks: Ranks) -> None:
    """Load every encoder that doesn't come from this work folder, before days are spent on others.

    Hub names and bundles are fetched on the way.

    Raises:
        DataError: one that can't be had.
    """
    names = {_encoder_name(recipe, s, a) for a in recipe.finetune.arms for s in recipe.seeds}
    problem: W2vrepError | None = None
    if ranks.main:
        try:
            for name in sorted(names):
                if not _is_run(name):
                    load_encoder(name)
        except W2vrepError as error:
            problem = error
    problem = ranks.gather(problem)[0]
    if problem is not None:
        raise problem


def missing_encoders(recipe: Recipe) -> list[DataError]:
    """Of encoders from elsewhere, those that are neither a folder of this machine nor a name by
    which one can be fetched."""
    names = {_encoder_name(recipe, s, a) for a in recipe.finetune.arms for s in recipe.seeds}
    missing = []
    for name in sorted(names):
        try:
            if not _is_run(name):
                encoder_source(name)
        except DataError as error:
            where = f"finetune.encoder: {error.where}"
            missing.append(DataError(error.found, where=where, do=error.do))
    return missing


def _encoder_name(recipe: Recipe, seed: int, arm: str) -> str:
    return recipe.finetune_arm(arm).encoder.replace("{seed}", str(seed))


def _is_run(name: str) -> bool:
    """Whether a name means a run of the work folder, and not a folder that is there."""
    run = named_run(name)
    return run is not None and run.seed.isdecimal() and not Path(name).exists()


def _run(work: WorkFolder, name: str) -> RunFolder | None:
    """The run of the work folder that a name means."""
    run = named_run(name) if _is_run(name) else None
    return None if run is None else work.run(run.stage, run.arm, int(run.seed))


def encoder_path(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> Path | HubName | str:
    """``finetune.encoder`` of an arm for a seed: the folder of a finished run of this work folder,
    another folder, a hub name or the name of a bundle.

    Raises:
        UnfinishedError: the run isn't finished.
        DataError: its model is gone, or there is no such thing.
        DivergedError: the run diverged.
    """
    name = _encoder_name(recipe, seed, arm)
    run = _run(work, name)
    if run is None:
        return encoder_source(name)
    record = read_record(run)
    if record is not None and record.outcome == "diverged":
        raise DivergedError(f"its encoder {run.name} diverged", where="finetune.encoder")
    if not (run.model / SAFETENSORS).exists():
        if record is not None and record.status == "finished":
            raise DataError(
                f"the encoder {run.name} is finished, but its model isn't here",
                where="finetune.encoder",
                do=f"bring {run.model}, or delete the run's folder and {run.stage} it again",
            )
        error = UnfinishedError(
            f"the encoder {run.name} isn't finished",
            where="finetune.encoder",
            do=f"{run.stage} it first: w2vrep {run.stage} RECIPE --work {work.root} "
            f"--arm {run.arm} --seed {run.seed}",
        )
        error.run = run.name
        raise error
    return run.model


def settings_of_encoder(recipe: Recipe, work: WorkFolder, seed: int, arm: str) -> dict[str, Any]:
    """What tells an encoder from another one of the same name: a hash of its files, or a commit.

    A bundle's name stands for the same weights everywhere.
    """
    source = encoder_path(recipe, work, seed, arm)
    if isinstance(source, HubName):
        return {"encoder_commit": source.commit}
    if not isinstance(source, Path):
        return {}
    weights = [source / name for name in (SAFETENSORS, PICKLED) if (source / name).is_file()]
    digest = hashlib.sha256()
    for file in (source / CONFIG, *weights[:1]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    settings: dict[str, Any] = {"encoder_sha256": digest.hexdigest()}
    return settings if wants_normalized(source) else settings | {"encoder_input": "as it is"}
