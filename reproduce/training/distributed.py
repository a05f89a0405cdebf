"""One process or many: ranks, sums over ranks, nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from reproduce.errors import DivergedError, FailedRunsError, InterruptedRun, UsageError

T = TypeVar("T")
BUCKET_ELEMENTS = 8_388_608
"""Gradients are summed over ranks in flat buckets of this many elements (32 MiB in float32)."""
PATIENCE = timedelta(days=7)
"""Ranks wait so long for one that downloads a corpus or writes a checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. ``rank`` 0 writes files.

    Tensors are summed on their device (NCCL, Gloo). Objects and waiting go over a Gloo group of
    their own, ``patient``: no watchdog of a GPU's queue counts how long that takes.
    """

    rank: int
    world: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This rank's share of an update's micro-batches with their positions, round robin."""
        return [(i, item) for i, item in enumerate(items) if i % self.world == self.rank]

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum tensors over ranks in place, in flat buckets a dtype and device."""
        if self.world == 1:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for tensor in tensors:
            full = bucket and size + tensor.numel() > BUCKET_ELEMENTS
            if full or (bucket and tensor.dtype != bucket[0].dtype):
                _sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        if bucket:
            _sum_bucket(bucket)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


def _sum_bucket(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


LAUNCHERS = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SUBMITIT_EXECUTOR", "SLURM_JOB_ID")
"""Variables that those who start our processes set."""


def under_launcher() -> bool:
    """Whether something started this process that passes signals on."""
    return any(name in os.environ for name in LAUNCHERS)


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """`start`, and `stop` at the end.

    A rank that fails alone doesn't leave in order, since the others, which wait for its sums, would
    keep it: its process ends, and torchrun ends theirs.
    """
    ranks = start(device)
    try:
        yield ranks
    except (InterruptedRun, DivergedError, FailedRunsError):  # as all ranks do, at the same update
        stop()
        raise
    stop()


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun set up, or be the only process.

    Args:
        device: ``auto`` takes CUDA where there is a device, else the CPU.

    Raises:
        UsageError: ``cuda`` without a CUDA device, or more processes than devices.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device", where="--device cuda", do="use --device cpu, or install CUDA's driver"
        )
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda and local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local + 1} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}",
            where="torchrun --nproc-per-node",
            do=f"start {torch.cuda.device_count()} processes, or use --device cpu",
        )
    where = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if world == 1:
        return Ranks(rank, world, where)
    if not dist.is_initialized():
        if cuda:
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=where)
        else:
            dist.init_process_group("gloo")
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)  # every rank is in it
    return Ranks(rank, world, where, patient)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
