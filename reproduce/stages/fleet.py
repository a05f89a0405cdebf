"""The training stages by several workers: on this machine, or as jobs of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from reproduce.errors import UsageError
from reproduce.grid.status import grid_runs
from reproduce.grid.workers import Fleet, LocalFleet, visible_gpus, watch, worker_command
from reproduce.recipe.schema import Recipe
from reproduce.records import Stage, WorkFolder


@dataclass(frozen=True)
class Hands:
    """Who trains: what ``--jobs`` and ``--cluster`` say, and the options every worker gets."""

    jobs: str | None
    cluster: str | None
    options: Sequence[str]


def hands_of(
    recipe: Recipe, jobs: str | None, cluster: str | None, options: Sequence[str]
) -> Hands | None:
    """None where this process trains by itself.

    Raises:
        UsageError: no number, no GPU, or a launcher has started this process already.
    """
    if jobs not in (None, "gpus") and not (str(jobs).isdecimal() and int(str(jobs)) > 0):
        raise UsageError(f"found {jobs!r}", where="--jobs", do="give a number from 1, or gpus")
    if cluster is not None and jobs == "gpus":
        raise UsageError(
            "gpus are those of this machine",
            where="--jobs",
            do="give the number of jobs, or leave --jobs out: one a run",
        )
    wanted = recipe.compute.processes
    if "WORLD_SIZE" not in os.environ:
        alone = jobs in (None, "1") and cluster is None and wanted == 1
        return None if alone else Hands(jobs, cluster, options)
    if jobs is not None or cluster is not None:
        raise UsageError(
            "a launcher started this process, which starts no others",
            where="--jobs" if jobs is not None else "--cluster",
            do="leave torchrun out; compute.processes says how many processes a run has",
        )
    if wanted not in (1, world := int(os.environ["WORLD_SIZE"])):
        raise UsageError(
            f"{wanted} processes a run, and a launcher started {world}",
            where="compute.processes",
            do="leave it, or the launcher, out",
        )
    return None


def train_by(
    hands: Hands,
    stage: Stage,
    recipe: Recipe,
    work: WorkFolder,
    arms: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """A stage's runs by workers, to their end; see :func:`reproduce.grid.workers.watch`."""
    if not work.summary.exists():
        from reproduce.data.manifest import Manifest

        Manifest.read(work.data)  # says what is missing
    command = worker_command(stage, hands.options, arms, seeds)
    runs = grid_runs(recipe, work, [stage], arms, seeds)
    fleet: Fleet
    if hands.cluster is None:
        fleet, count = _on_this_machine(hands, command, stage, recipe, work)
    else:
        from reproduce.grid.slurm import SlurmFleet

        count = int(hands.jobs) if hands.jobs else _units(stage, recipe, arms) * len(seeds)
        fleet = SlurmFleet(command, work.logs, stage, recipe)
    watch(fleet, count, runs)


def _on_this_machine(
    hands: Hands, command: Sequence[str], stage: Stage, recipe: Recipe, work: WorkFolder
) -> tuple[LocalFleet, int]:
    processes = recipe.compute.processes
    gpus = visible_gpus() if recipe.compute.device != "cpu" else []
    wanted = hands.jobs == "gpus"
    if (wanted or gpus) and len(gpus) < processes:
        raise UsageError(
            f"{len(gpus)} GPUs here, and a run needs {processes}" if gpus else "no GPU here",
            where="--jobs gpus" if wanted else "compute.processes",
            do="give --jobs N --device cpu" if wanted else f"set it to {len(gpus)} at most",
        )
    count = len(gpus) // processes if wanted else int(hands.jobs or 1)
    fleet = LocalFleet(command, work.logs, stage, count, processes, gpus)
    return fleet, count


def _units(stage: Stage, recipe: Recipe, arms: Sequence[str]) -> int:
    """What a seed's arms can be shared into: arms that train together are one."""
    if stage == "pretrain":
        return len(arms)
    from reproduce.tasks.bank import banks

    return len(list(banks(recipe, arms)))
