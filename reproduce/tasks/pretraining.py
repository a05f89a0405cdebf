"""The pretraining task: contrastive, diversity and inter-codebook similarity loss of one arm."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reproduce.data.batches import Batch, Speech
from reproduce.model.encoder import EncoderConfig
from reproduce.model.interop import save_huggingface
from reproduce.model.masking import drop_lonely, sample_negatives, span_mask, speech_frames
from reproduce.model.precision import exactly
from reproduce.model.pretrainer import PretrainingModel
from reproduce.objective.codes import code_counts, code_nmi_table
from reproduce.objective.contrastive import Comparison, compare
from reproduce.objective.icsl import codebook_similarity, icsl
from reproduce.position import derive_seed, generator
from reproduce.recipe.schema import Model, Pretrain
from reproduce.records import AT_CHANCE_MARGIN, Outcome, RunRecord, write_bytes
from reproduce.tasks.context import Context
from reproduce.tasks.validation import over_batches
from reproduce.tasks.wiring import (
    adamw,
    autocast,
    compile_encoder,
    loop_settings,
    plan_of,
    speech_of,
)
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Learner, Loop, Row, Task, Terms
from reproduce.training.schedule import GumbelTemperature

COLLAPSED_PERPLEXITY = 2.0
"""A codebook that uses fewer than two codes on validation has collapsed."""


def train_arm(
    context: Context,
    arm: str,
    seed: int,
    record: RunRecord,
    label: str,
    task_class: type[PretrainTask] | None = None,
) -> None:
    """One run, from its newest checkpoint or from the start; of `PretrainTask` or what is given."""
    section = context.recipe.pretrain_arm(arm)
    model = build_model(context.recipe.model, section, seed).to(context.ranks.device)
    compile_encoder(context, model.encoder)
    train, valid = (speech_of(context, section, split) for split in ("train", "valid"))
    task = (task_class or PretrainTask)(model, section, train, valid, seed, context)
    optimizer = adamw(model.parameters(), section)
    learner = Learner(
        context.work.run("pretrain", arm, seed),
        record,
        model.parameters(),
        optimizer,
        section.optimizer.clip_norm,
    )
    task.name = learner.name
    plan = plan_of(section, train.cropped, seed)
    settings = loop_settings(section, "pretrain", seed, plan, label, context.recipe.compute)
    Loop(task, [learner], train, plan, settings, context.ranks).run()


def build_model(model: Model, section: Pretrain, seed: int) -> PretrainingModel:
    """A model with the initial weights of a seed, the same for all arms as far as shapes agree."""
    torch.manual_seed(derive_seed(seed, "init"))
    quantizer = section.quantizer
    return PretrainingModel(
        EncoderConfig(**model.model_dump(), extractor_gradient=section.extractor_gradient),
        codebooks=quantizer.codebooks,
        entries=quantizer.entries,
        codevector_dim=quantizer.codevector_dim,
        projection_dim=quantizer.projection_dim,
        codevector_init=quantizer.init,
        quantizer_dropout=quantizer.dropout,
        temperature=section.contrastive.temperature,
        diversity=section.diversity.form,
        remove_collisions=section.contrastive.remove_collisions,
    )


@dataclass(frozen=True)
class Draws:
    """What an update compares, drawn by position.

    Attributes:
        counts: masked frames of each micro-batch of all ranks.
        frames: frames that the masks could have covered, all micro-batches together.
        comparisons: index -> which frames this rank's micro-batch compares.
    """

    counts: list[int]
    frames: int
    comparisons: dict[int, Comparison]


class PretrainTask(Task):
    """Contrastive, diversity and inter-codebook similarity loss of one arm."""

    metric_names = (
        "contrastive_loss",
        "chance_loss",
        "diversity_loss",
        "perplexity",
        "negatives_kept",
    )

    def __init__(
        self,
        model: PretrainingModel,
        section: Pretrain,
        train: Speech,
        valid: Speech,
        seed: int,
        context: Context,
    ) -> None:
        self.model, self.section, self.seed, self.context = model, section, seed, context
        self.train, self.valid = train, valid
        self.name = ""
        self.device = context.ranks.device
        gumbel = section.gumbel
        self.temperature = GumbelTemperature(
            gumbel.start, gumbel.floor, gumbel.factor, section.updates
        )
        self.first_codebooks = model.quantizer.codebooks().detach().cpu().numpy().copy()
        self.draws = Draws([], 0, {})
        self.codes: np.ndarray | None = None
        self.last_valid: Row = {}

    # -------------------------------------------------------------------------------- one update

    def look_ahead(
        self, update: int, micro_batches: Sequence[Sequence[int]], own: Sequence[int]
    ) -> Draws:
        counts, total, comparisons = [], 0, {}
        for index, positions in enumerate(micro_batches):
            rng = generator(self.seed, "mask", update, index)
            mask, frames = self._mask(self.train.lengths(positions), rng)
            counts.append(int(mask.sum()))
            total += frames
            if index in own:
                rng = generator(self.seed, "negatives", update, index)
                comparisons[index] = self._compare(mask, rng)
        return Draws(counts, total, comparisons)

    def begin_update(
        self, update: int, micro_batches: Sequence[Sequence[int]], ahead: Draws
    ) -> None:
        self.model.train()
        self.draws = ahead

    def _mask(self, lengths: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The mask of a batch [B, F] and the frames it could have covered."""
        options = self.section.masking
        total = self.model.encoder.frames(max(lengths))
        frames = [self.model.encoder.frames(length) for length in lengths]
        if self.section.input_length == "padded":
            frames = [total] * len(frames)
        mask = span_mask(
            frames,
            total,
            probability=options.probability,
            length=options.length,
            min_spans=options.min_spans,
            spans_drawn=options.spans_drawn,
            rng=rng,
        )
        return drop_lonely(mask)[0], sum(frames)

    def _compare(self, mask: np.ndarray, rng: np.random.Generator) -> Comparison:
        """The masked frames with negatives drawn for them."""
        negatives = sample_negatives(mask, self.section.contrastive.negatives, rng)
        return compare(torch.from_numpy(mask), torch.from_numpy(negatives), self.device)

    def counts(self, micro_batches: Sequence[Sequence[int]]) -> list[int]:
        return self.draws.counts

    def forward(self, update: int, index: int, batch: Batch) -> dict[str, Terms]:
        noise = torch.Generator(self.device)
        noise.manual_seed(derive_seed(self.seed, "gumbel", update, index))
        with autocast(self.context):
            out = self.model(
                batch.waveform.to(self.device, non_blocking=True),
                batch.lengths,
                comparison=self.draws.comparisons[index],
                gumbel_temperature=self.temperature(update),
                generator=noise,
            )
        count = out.masked_frames
        loss = out.contrastive_loss + self.section.diversity.weight * out.diversity_loss
        if self.section.icsl.weight > 0:
            loss = loss + self._icsl_coefficient(count) * self._icsl()
        metrics: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {
            "contrastive_loss": (out.contrastive_loss, count),
            "chance_loss": (out.chance_loss, count),
            "diversity_loss": (out.diversity_loss, count),
            "perplexity": (out.perplexity, 1.0),
            "negatives_kept": (out.negatives_kept, count),
        }
        return {self.name: Terms(loss, metrics)}

    def _icsl(self) -> torch.Tensor:
        options = self.section.icsl
        (similarity,) = exactly(
            lambda codebooks: [icsl(codebooks, options.form, options.pairs)],
            self.model.quantizer.codebooks(),
        )
        return similarity

    def _icsl_coefficient(self, count: int) -> float:
        """What ICSL is multiplied by in a micro-batch's summed loss."""
        options = self.section.icsl
        if options.scaling == "per_frame":
            return options.weight * count
        outside = 1 if options.divided_by_accumulation else self.section.accumulation
        return options.weight * outside

    def inspect(self, update: int, weights: list[float] | None, divisor: float) -> Row:
        """ICSL's weight beside the mean loss a frame, and its share of the codebooks' gradient.

        The share is |g_icsl| / (|g_icsl| + |g_rest|), norms over the codevectors' gradient.
        """
        counts = self.draws.counts
        scales = weights or [1.0] * len(counts)
        coefficients = [self._icsl_coefficient(count) for count in counts]
        sent = sum(w * c for w, c in zip(scales, coefficients, strict=True)) / divisor
        frames = sum(w * n for w, n in zip(scales, counts, strict=True)) / divisor
        row: Row = {
            "mask_fraction": sum(counts) / self.draws.frames,
            "icsl_effective_weight": sent / frames if frames else 0.0,
        }
        due = update % self.section.gradient_share_every == 0 or update == 1
        if due and self.section.quantizer.codebooks > 1:
            (parameter,) = self.model.codebook_parameters()
            value = self._icsl()
            row["icsl"] = float(value.detach())
            (gradient,) = torch.autograd.grad(value, parameter)
            own = gradient * sent
            assert parameter.grad is not None
            rest = float((parameter.grad - own).norm())
            share = float(own.norm())
            row["icsl_gradient_share"] = share / (share + rest) if share + rest > 0 else 0.0
        return row

    def values(self, update: int, learner: Learner) -> Row:
        return {"gumbel_temperature": self.temperature(update)}

    # -------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, update: int, ranks: Ranks) -> dict[str, Row]:
        """Means over the validation frames; ranks share the batches, sums are in batch order."""
        self.model.eval()
        parts = over_batches(
            len(self.valid),
            self.section.validation.batch_size,
            ranks,
            lambda number, positions: self._look_at(number, positions, update),
            lambda made: self._validate_batch(*made),
            self.context.recipe.compute,
        )
        sums = {name: sum(part[name] for part in parts) for name in _VALID_SUMS}
        codes = np.concatenate([part["codes"] for part in parts])
        self.codes = codes
        count, speech = sums["count"], sums["speech_count"]
        entries = self.section.quantizer.entries
        row: Row = {
            name: sums[name] / count if count else float("nan")
            for name in ("contrastive_loss", "chance_loss", "diversity_loss", "negatives_kept")
        }
        for name in ("speech_loss", "speech_chance"):
            row[name] = sums[name] / speech if speech else None
        row |= {
            "perplexity": float(np.sum(_perplexity(code_counts(codes, entries)))),
            "mask_fraction": count / sums["frames"],
            "audio_seconds": self.valid.seconds,
        }
        if codes.shape[1] > 1:
            row["icsl"] = float(self._icsl())
            table = code_nmi_table(codes, entries)
            row["code_nmi"] = float(np.nanmean(table.measured - table.baseline))
        self.last_valid = row
        return {self.name: row}

    def _look_at(
        self, index: int, positions: list[int], update: int
    ) -> tuple[Batch, Comparison, Comparison, int]:
        """A batch of validation, what it compares, of all masked frames and of those of speech, and
        the frames its mask could have covered."""
        where = (index, update) if self.section.validation.redraw else (index,)
        batch = self.valid.collate(positions).pinned(self.device)
        lengths = self.valid.lengths(positions)
        mask, frames = self._mask(lengths, generator(self.seed, "valid mask", *where))
        comparison = self._compare(mask, generator(self.seed, "valid negatives", *where))
        speech = drop_lonely(mask & self._speech(batch, mask.shape[1]))[0]
        rng = generator(self.seed, "valid speech negatives", *where)
        return batch, comparison, self._compare(speech, rng), frames

    def _speech(self, batch: Batch, total: int) -> np.ndarray:
        """Frames of a batch that are no silence [B, total]."""
        config, lengths = self.model.encoder.config, batch.lengths.tolist()
        window = hop = 1
        for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
            window, hop = window + (kernel - 1) * hop, hop * stride
        return speech_frames(
            [row[:length].numpy() for row, length in zip(batch.waveform, lengths, strict=True)],
            [self.model.encoder.frames(length) for length in lengths],
            total,
            hop=hop,
            window=window,
        )

    def _validate_batch(
        self, batch: Batch, comparison: Comparison, speech: Comparison, frames: int
    ) -> dict[str, Any]:
        with autocast(self.context):
            out = self.model(
                batch.waveform.to(self.device), batch.lengths, comparison=comparison, subset=speech
            )
        sums = (
            *(out.contrastive_loss, out.chance_loss, out.diversity_loss, out.negatives_kept),
            *(out.subset.loss, out.subset.chance),
        )
        read = torch.stack([value.double() for value in sums]).tolist()  # waits once
        return {
            **dict(zip(_VALID_SUMS[: len(sums)], read, strict=True)),
            "count": out.masked_frames,
            "speech_count": out.subset.count,
            "frames": frames,
            "codes": out.codes.cpu().numpy(),
        }

    # ------------------------------------------------------------------------ state and the end

    def state(self, learner: Learner) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def load_state(self, learner: Learner, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])

    def finish(self, learner: Learner) -> Outcome:
        if self.codes is None:  # stopped between the last update and here
            self.validate(self.section.updates, self.context.ranks)
        assert self.codes is not None
        if self.context.ranks.main:
            self._write(learner)
        return outcome_of(self.last_valid, self.section.quantizer.codebooks)

    def _write(self, learner: Learner) -> None:
        section, run = self.section, learner.run
        assert self.codes is not None
        save_huggingface(
            self.model,
            run.model,
            extra_config={
                "num_negatives": section.contrastive.negatives,
                "diversity_loss_weight": section.diversity.weight,
                "mask_time_prob": section.masking.probability,
                "mask_time_length": section.masking.length,
                "mask_time_min_masks": section.masking.min_spans,
            },
        )
        last = self.model.quantizer.codebooks().detach().cpu()
        table = code_nmi_table(self.codes, section.quantizer.entries)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            codebooks_first=self.first_codebooks,
            codebooks_last=last.numpy(),
            code_counts=code_counts(self.codes, section.quantizer.entries),
            nmi=table.measured,
            nmi_baseline=table.baseline,
            similarity_first=codebook_similarity(torch.from_numpy(self.first_codebooks)).numpy(),
            similarity_last=codebook_similarity(last).numpy(),
        )
        write_bytes(run.codes, content.getvalue())


_VALID_SUMS = (
    "contrastive_loss",
    "chance_loss",
    "diversity_loss",
    "negatives_kept",
    "speech_loss",
    "speech_chance",
    "count",
    "speech_count",
    "frames",
)


def _perplexity(counts: np.ndarray) -> np.ndarray:
    """exp of the entropy of each codebook's use, counts [G, V] -> [G]."""
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(np.exp(-(shares * logs).sum(axis=1)))


def outcome_of(valid: Row, codebooks: int) -> Outcome:
    """How a pretraining run ended, by its last validation."""
    perplexity, loss, chance = (
        valid.get(name) for name in ("perplexity", "contrastive_loss", "chance_loss")
    )
    if isinstance(loss, float) and not math.isfinite(loss) and valid.get("mask_fraction"):
        return "diverged"
    if isinstance(perplexity, float) and perplexity / codebooks < COLLAPSED_PERPLEXITY:
        return "collapsed"
    known = isinstance(loss, float) and isinstance(chance, float)
    if known and abs(loss - chance) <= AT_CHANCE_MARGIN:  # type: ignore[operator]
        return "at_chance"
    return "ok"
