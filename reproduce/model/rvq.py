"""Residual vector quantization with EMA codebooks, batched over the arms of an experiment.

Several residual quantizers that differ in their number of levels read the same features: level l of
every arm that has one is one batched matrix product. An arm in the bank equals the arm alone.

Sources: residual quantization, Zeghidour et al. 2021 (SoundStream), algorithm 1; EMA codebooks,
van den Oord et al. 2017 (VQ-VAE), appendix A.1. First codebooks, smoothing and revival follow
vector-quantize-pytorch 1.23 (``ResidualVQ``), the library of the study.

Letters: A arms, L levels, C codebooks (sum of the levels over arms), V codes a codebook, B batch,
F frames, N frames that take part, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from reproduce.errors import DataError
from reproduce.model.codebook import (
    CodeSums,
    add_by_code,
    code_counts,
    kmeans,
    lookup,
    nearest,
    squared_norms,
)
from reproduce.model.precision import full_precision
from reproduce.objective.frames import Frames, sent, valid_frames
from reproduce.position import derive_seed

SMOOTHING = 1e-5
"""Laplace smoothing of cluster sizes (vector-quantize-pytorch ``eps``)."""
ARM_BUFFERS = ("codebooks", "cluster_size", "vector_sum")
ARM_COUNTS = ("moves", "initialized")
"""Of an arm too, but known to the host."""


@dataclass(frozen=True)
class RvqOptions:
    """What the arms of a bank share; the defaults are the study's own setting.

    Args:
        codes: V, codes a level.
        decay: EMA decay of cluster sizes and vector sums at each movement of the codebooks.
        ema: ``micro_batch``: codebooks move in each forward pass in train mode (one process only);
            ``update``: they move in :meth:`ResidualQuantizers.apply_update`.
        padding: padded frames take part like any other.
        kmeans_init: codebooks start from k-means, see :meth:`ResidualQuantizers.initialize`.
        revive_below: codes whose EMA cluster size (frames a movement) is under this are replaced
            by frames of the current data; None: never.
        straight_through: the gradient of the quantized features goes to the features unchanged
            (once, however many levels); False: no gradient goes through.
    """

    codes: int = 256
    decay: float = 0.99
    ema: Literal["micro_batch", "update"] = "micro_batch"
    padding: bool = True
    kmeans_init: bool = False
    revive_below: float | None = None
    straight_through: bool = False


@dataclass(frozen=True)
class QuantizedBank:
    """Result of :class:`ResidualQuantizers`; tuples have one entry an arm, in the caller's order.

    Attributes:
        quantized: [B, F, D] an arm, the sum of the chosen codes; zero at frames left out.
        codes: [B, F, L] int64 an arm; -1 at frames left out.
        commitment: [A], sum over frames and levels of the mean over D of (x - sg(sum of the codes
            so far))^2; unweighted. Divide by ``frames`` for the mean.
        frames: N, frames that took part.
        sums: the arms' statistics.
    """

    quantized: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    commitment: Tensor
    frames: int
    sums: tuple[CodeSums, ...]


class ResidualQuantizers(nn.Module):
    """A bank of residual quantizers over the same features.

    Codebooks are stored level by level and, within a level, by decreasing number of levels of the
    arm: the codebooks of a level are one slice [A_l, V, D], and the arms active at a level are the
    first A_l.

    Nothing here waits for a GPU but :meth:`initialize` and what reads a state: which frames take
    part follows from lengths on the CPU, and how often codebooks moved is known there.

    Args:
        levels: number of levels of each arm, each >= 1.
        dim: D.
        seeds: one an arm; everything random about an arm follows from its own.
        options: see :class:`RvqOptions`.

    Without k-means, first codes are uniform in +-sqrt(6 / (V D)): Kaiming's bound for a tensor of
    [1, V, D], as the library of the study draws them.
    """

    codebooks: Tensor
    cluster_size: Tensor
    vector_sum: Tensor
    _by_arm: Tensor
    _sizes: Tensor
    _sums: Tensor
    _candidates: Tensor
    _filled: Tensor

    def __init__(
        self, levels: Sequence[int], dim: int, *, seeds: Sequence[int], options: RvqOptions
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 1 or len(levels) != len(seeds):
            raise ValueError(
                f"levels {list(levels)}: one or more arms, each >= 1, with a seed each"
            )
        self.levels, self.dim, self.seeds, self.options = tuple(levels), dim, tuple(seeds), options
        self._order = sorted(range(len(levels)), key=lambda arm: -levels[arm])
        self._slices: list[slice] = []
        start = 0
        for level in range(max(levels)):
            stop = start + sum(count > level for count in levels)
            self._slices.append(slice(start, stop))
            start = stop

        codes = options.codes
        codebooks = torch.zeros(start, codes, dim)
        if not options.kmeans_init:
            bound = math.sqrt(6 / (codes * dim))
            for arm in range(len(levels)):
                for level, row in enumerate(self.rows(arm)):
                    codebooks[row].uniform_(-bound, bound, generator=self._generator(arm, level))
        self.register_buffer("codebooks", codebooks)
        self.register_buffer("cluster_size", torch.ones(start, codes))
        self.register_buffer("vector_sum", codebooks.clone())
        # An arm's movements so far, and whether its codebooks have been started.
        self.moves = [0] * len(levels)
        self.initialized = [not options.kmeans_init] * len(levels)
        rows = [row for arm in range(len(levels)) for row in self.rows(arm)]
        self.register_buffer("_by_arm", torch.tensor(rows), persistent=False)
        # What the frames seen since the last movement add up to.
        self.register_buffer("_sizes", torch.zeros(start, codes), persistent=False)
        self.register_buffer("_sums", torch.zeros(start, codes, dim), persistent=False)
        slots = 0 if options.revive_below is None else codes
        self.register_buffer("_candidates", torch.zeros(start, slots, dim), persistent=False)
        self.register_buffer("_filled", torch.zeros(slots), persistent=False)

    def rows(self, arm: int) -> list[int]:
        """Where an arm's codebooks, first level first, lie in the buffers."""
        place = self._order.index(arm)
        return [self._slices[level].start + place for level in range(self.levels[arm])]

    def forward(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        *,
        micro_batch: tuple[int, int] | None = None,
    ) -> QuantizedBank:
        """Quantize features [B, F, D] in the codebooks' precision, without autocast and TF32.

        In train mode the frames count for the codebooks: these move here (``ema="micro_batch"``),
        after the frames were quantized with the old ones, or in :meth:`apply_update`.

        Args:
            lengths: [B] frames of each utterance, best on the CPU; None: all F. Frames beyond take
                no part.
            micro_batch: (index, number) of this micro-batch within the update, counted over all
                ranks. Needed where codes are revived once an update.

        Raises:
            RuntimeError: codebooks wait for :meth:`initialize`.
            ValueError: ``micro_batch`` is needed and missing.
        """
        if not all(self.initialized):
            raise RuntimeError("codebooks not initialized: call initialize() with frames first")
        if self.training and self.options.ema == "micro_batch":
            micro_batch = (0, 1)
        if self.training and micro_batch is None and self.options.revive_below is not None:
            raise ValueError("reviving codes once an update needs micro_batch=(index, number)")
        chosen = _chosen(features, lengths)
        with full_precision(features.device), torch.no_grad():
            frames = _rows(features.to(self.codebooks.dtype), chosen)
            slope_wanted = features.requires_grad
            quantized, codes, errors, counts, slope = self._walk(frames, slope_wanted, micro_batch)
            if self.training and self.options.ema == "micro_batch":
                self.apply_update()

        def unpacked(rows: Tensor, fill: int) -> Tensor:
            """[N, X] -> [B, F, X]."""
            if chosen is None:
                return rows.view(*features.shape[:2], -1)
            return chosen.put(rows, fill)

        sums, outputs, arm_codes, commitment = [], [], [], []
        # Exactly zero, with the gradient of the features: carries gradients, changes no value.
        ghost = features - features.detach() if features.requires_grad else None
        valid = None if chosen is None or ghost is None else chosen.sent(chosen.where)[..., None]
        errors_by_arm, counts_by_arm = (
            torch.split(tensor.index_select(0, self._by_arm), list(self.levels))  # type: ignore[no-untyped-call]
            for tensor in (errors, counts)
        )
        for arm in range(len(self.levels)):
            place = self._order.index(arm)
            sums.append(CodeSums(errors_by_arm[arm], counts_by_arm[arm]))
            output = unpacked(quantized[place], 0)
            loss = errors_by_arm[arm].sum().to(output.dtype)
            if ghost is not None and slope is not None:
                loss = loss + (slope[place] * _rows(ghost, chosen)).sum()
                if self.options.straight_through:
                    output = output + (ghost if valid is None else ghost * valid)
            outputs.append(output)
            commitment.append(loss)
            levels = [codes[level][place] for level in range(self.levels[arm])]
            arm_codes.append(unpacked(torch.stack(levels, -1), -1))
        return QuantizedBank(
            tuple(outputs), tuple(arm_codes), torch.stack(commitment), len(frames), tuple(sums)
        )

    def _walk(
        self, frames: Tensor, slope_wanted: bool, micro_batch: tuple[int, int] | None
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor | None]:
        """All levels of all arms for frames [N, D], arms in storage order.

        Returns:
            quantized [A, N, D]; codes, [A_l, N] a level; squared errors [C]; counts [C, V]; the
            gradient [A, N, D] of the commitment loss with respect to the frames, if wanted.
        """
        residual = frames.expand(len(self.levels), -1, -1)
        quantized = torch.zeros_like(residual, memory_format=torch.contiguous_format)
        slope = torch.zeros_like(quantized) if slope_wanted else None
        errors = torch.zeros(len(self.codebooks), dtype=torch.float64, device=frames.device)
        counts = torch.zeros(
            self.codebooks.shape[:2], dtype=torch.int64, device=self.codebooks.device
        )
        slots, picks = self._offer(len(frames), micro_batch)
        scratch = torch.empty_like(quantized)
        all_codes = []
        for level, rows in enumerate(self._slices):
            active = rows.stop - rows.start
            residual = residual[:active]
            codes = nearest(residual, self.codebooks[rows])
            counts[rows] = code_counts(codes, self.options.codes)
            if self.training:
                self._sizes[rows] += counts[rows]
                add_by_code(self._sums[rows], residual, codes)
                if picks is not None:
                    chosen = residual.gather(1, picks[:active, :, None].expand(-1, -1, self.dim))
                    self._candidates[rows, slots] += chosen
            nearby = lookup(self.codebooks[rows], codes, scratch[:active])
            quantized[:active] += nearby
            residual = residual - nearby if level == 0 else residual.sub_(nearby)
            errors[rows] = squared_norms(residual) / self.dim
            if slope is not None:
                slope[:active].add_(residual, alpha=2 / self.dim)
            all_codes.append(codes)
        return quantized, all_codes, errors, counts, slope

    def pending(self) -> list[Tensor]:
        """What waits for :meth:`apply_update`: sum each tensor over ranks in place before it."""
        tensors = [self._sizes, self._sums]
        if self.options.revive_below is not None:
            tensors += [self._candidates, self._filled]
        return tensors

    @torch.no_grad()
    def apply_update(self) -> None:
        """Move the codebooks once by the frames seen since the last movement, then revive codes."""
        self.cluster_size.lerp_(self._sizes, 1 - self.options.decay)
        self.vector_sum.lerp_(self._sums, 1 - self.options.decay)
        self._normalize()
        if self.options.revive_below is not None:
            fresh = self.cluster_size.new_full((), self.options.revive_below)
            dead = (self.cluster_size < fresh) & (self._filled > 0)
            wide = dead.unsqueeze(-1)
            self.cluster_size.copy_(torch.where(dead, fresh, self.cluster_size))
            self.vector_sum.copy_(torch.where(wide, fresh * self._candidates, self.vector_sum))
            self.codebooks.copy_(torch.where(wide, self._candidates, self.codebooks))
        for tensor in self.pending():
            tensor.zero_()
        self.moves = [moves + 1 for moves in self.moves]

    @torch.no_grad()
    def initialize(self, features: Tensor, lengths: Tensor | None = None) -> None:
        """Start the codebooks by k-means on features [B, F, D] or frames [N, D], level by level.

        Deterministic, given the arms' seeds and the frames in their order. For the same start on
        any number of ranks every rank passes the frames of the whole first update. First means are
        frames, drawn without replacement where there are enough; a code that ends without frames
        is zero. As in the library of the study.

        Args:
            lengths: [B] frames of each utterance; ignored if ``options.padding``.
        """
        if features.ndim == 3:
            chosen = None if self.options.padding else _chosen(features, lengths)
            features = _rows(features, chosen)
        frames = features.to(self.codebooks)
        if len(frames) == 0:
            raise ValueError("no frames to start the codebooks from")
        with full_precision(frames.device):
            self._start(frames)
        self.initialized = [True] * len(self.levels)

    def _start(self, frames: Tensor) -> None:
        """k-means on frames [N, D], level by level."""
        residual = frames.expand(len(self.levels), -1, -1)
        for level, rows in enumerate(self._slices):
            residual = residual[: rows.stop - rows.start]
            means = torch.stack(
                [
                    vectors[_draw(len(frames), self.options.codes, self._generator(arm, level))]
                    for vectors, arm in zip(residual, self._order)
                ]
            )
            means, sizes = kmeans(residual, means)
            self.cluster_size[rows] = sizes
            self.vector_sum[rows] = means * sizes.unsqueeze(-1)
            self._normalize()
            book = self.codebooks[rows]
            residual = residual - lookup(book, nearest(residual, book))

    def select(self, arms: Sequence[int]) -> ResidualQuantizers:
        """A bank of some of the arms, with copies of their state and of what is pending."""
        bank = ResidualQuantizers(
            [self.levels[arm] for arm in arms],
            self.dim,
            seeds=[self.seeds[arm] for arm in arms],
            options=self.options,
        ).to(self.codebooks)
        bank.train(self.training)
        for new, old in enumerate(arms):
            bank.load_arm_state(new, self.arm_state(old))
            for name in ("_sizes", "_sums", "_candidates"):
                getattr(bank, name)[bank.rows(new)] = getattr(self, name)[self.rows(old)]
        bank._filled.copy_(self._filled)
        return bank

    def arm_state(self, arm: int) -> dict[str, Tensor]:
        """Copies of an arm's buffers: codebooks [L, V, D], first level first, and their sums."""
        state = {name: getattr(self, name)[self.rows(arm)] for name in ARM_BUFFERS}
        counted = {name: torch.tensor(getattr(self, name)[arm]) for name in ARM_COUNTS}
        return state | counted

    def load_arm_state(self, arm: int, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`arm_state` gave.

        Raises:
            DataError: a tensor is missing, unexpected or of another shape.
        """
        expected = {name: tensor.shape for name, tensor in self.arm_state(arm).items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if found != expected:
            raise DataError(
                f"the quantizer's tensors are {_shapes(found)}, wanted {_shapes(expected)}",
                do="Use weights of an arm with the same levels, codes and feature width.",
            )
        for name in ARM_BUFFERS:
            buffer = getattr(self, name)
            buffer[self.rows(arm)] = state[name].to(buffer)
        for name in ARM_COUNTS:
            getattr(self, name)[arm] = state[name].item()

    def _generator(self, arm: int, *position: int | str) -> torch.Generator:
        seed = derive_seed(self.seeds[arm], "rvq", *position)
        return torch.Generator().manual_seed(seed)

    def _normalize(self) -> None:
        """Codes are vector sums over Laplace-smoothed cluster sizes of the same total."""
        total = self.cluster_size.sum(-1, keepdim=True)
        share = (self.cluster_size + SMOOTHING) / (total + SMOOTHING * self.options.codes)
        self.codebooks.copy_(self.vector_sum / (share * total).unsqueeze(-1))

    def _offer(
        self, frames: int, micro_batch: tuple[int, int] | None
    ) -> tuple[slice, Tensor | None]:
        """Which frames offer themselves to dead codes: the slots they fill and indices [A, slots].

        Slot s is for code s. Micro-batch j of M fills slots j, j + M, ...: the slots of an update
        add up over micro-batches and ranks, whoever computed them.
        """
        if not self.training or self.options.revive_below is None or micro_batch is None:
            return slice(0), None
        index, number = micro_batch
        wanted = min(len(range(index, self.options.codes, number)), frames)
        slots = slice(index, index + wanted * number, number)
        draws = [
            _draw(frames, wanted, self._generator(arm, "revive", self.moves[arm], index))
            for arm in self._order
        ]
        self._filled[slots] += 1
        return slots, sent(torch.stack(draws), self.codebooks.device)


def _draw(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices [wanted] below count, without replacement where possible."""
    if count >= wanted:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.randint(count, (wanted,), generator=generator)


def _chosen(features: Tensor, lengths: Tensor | None) -> Frames | None:
    """The frames of features [B, F, D] that take part; None: every one."""
    if lengths is None or bool((lengths >= features.shape[1]).all()):
        return None
    return Frames(valid_frames(lengths, features.shape[1]), features.device)


def _rows(values: Tensor, chosen: Frames | None) -> Tensor:
    """[B, F, D] -> [N, D]."""
    return values.flatten(0, 1) if chosen is None else chosen.pick(values)


def _shapes(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
