"""The fine-tuning task: CTC over one encoder and a bank of heads, with validation and outputs."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce.data.batches import Batch, Speech
from reproduce.data.vocabulary import Vocabulary
from reproduce.model.codebook import CodeSums
from reproduce.model.masking import channel_mask, span_mask
from reproduce.model.recognizer import EncoderMode, HeadBankOutput, Recognizer
from reproduce.model.trained import save_recognizer
from reproduce.objective.ctc import blank_frames, ctc_loss, greedy_decode
from reproduce.objective.error_rates import character_errors, word_errors
from reproduce.position import generator
from reproduce.recipe.schema import Finetune
from reproduce.records import HYPOTHESES_COLUMNS, Outcome, write_bytes, write_text
from reproduce.tasks.context import Context
from reproduce.tasks.validation import on_the_host, over_batches
from reproduce.tasks.wiring import autocast
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Learner, Row, Task, Terms

MOSTLY = 0.5
"""A recognizer whose output is empty for more than this share of utterances is ``all_blank``."""


def encoder_parameters(recognizer: Recognizer, section: Finetune) -> list[torch.nn.Parameter]:
    """What ``train`` trains of the encoder: all of it, or all but the extractor."""
    return [
        parameter
        for name, parameter in recognizer.encoder.named_parameters()
        if section.train == "all" or not name.startswith("feature_extractor.")
    ]


class FinetuneTask(Task):
    """CTC over one encoder and a bank of heads."""

    metric_names = ("ctc_loss", "zeroed", "blank_rate")
    total_names = ("zeroed",)

    def __init__(
        self,
        recognizer: Recognizer,
        section: Finetune,
        vocabulary: Vocabulary,
        train: Speech,
        valid: Speech,
        seed: int,
        context: Context,
        learners: Sequence[Learner],
    ) -> None:
        self.recognizer, self.section, self.vocabulary = recognizer, section, vocabulary
        self.train, self.valid, self.seed, self.context = train, valid, seed, context
        self.device = context.ranks.device
        self.names = {learner.run.arm: learner.name for learner in learners}
        self.micro_batches = 1
        self.commitment_weight = 0.0
        self.update_sums: dict[str, CodeSums] = {}
        self.window: dict[str, CodeSums] = {}
        self.last_valid: dict[str, _Validated] = {}
        unseen = sorted(set().union(*(vocabulary.unknown(text) for text in valid.texts)))
        if unseen and context.ranks.main:
            shown = " ".join(unseen)
            print(f"warning: characters not in the vocabulary: {shown}", file=sys.stderr)

    # -------------------------------------------------------------------------------- one update

    def begin_update(
        self, update: int, micro_batches: Sequence[Sequence[int]], ahead: None
    ) -> None:
        self.micro_batches = len(micro_batches)
        utterances = sum(len(positions) for positions in micro_batches)
        frames = sum(self._quantized_frames(positions) for positions in micro_batches)
        # Of a sum over frames, beside a loss that is divided by the utterances.
        self.commitment_weight = self.section.rvq.commitment * utterances / max(1, frames)
        self.recognizer.set_encoder_mode(self._encoder_mode(update))
        trained = {id(p) for p in encoder_parameters(self.recognizer, self.section)}
        for parameter in self.recognizer.encoder.parameters():
            active = self.recognizer.encoder_mode == "trained" and id(parameter) in trained
            parameter.requires_grad_(active)
        if self.recognizer.needs_codebooks:
            batches = (self.train.collate(positions) for positions in micro_batches)
            self.recognizer.initialize_codebooks(
                (self._inputs(batch) for batch in batches), features=self.train.features is not None
            )
        self.recognizer.train()
        self.update_sums = {}

    def _quantized_frames(self, positions: Sequence[int]) -> int:
        """Frames of a micro-batch that the quantizers see."""
        encoder: Any = self.recognizer.encoder
        frames = [encoder.frames(samples) for samples in self.train.lengths(positions)]
        return max(frames) * len(frames) if self.section.rvq.padding else sum(frames)

    def _encoder_mode(self, update: int) -> EncoderMode:
        section = self.section
        if section.train == "head":
            return "frozen_eval" if section.encoder_mode == "eval" else "frozen_train"
        waits = update <= round(section.transformer_from * section.updates)
        return "frozen_train" if waits else "trained"

    def counts(self, micro_batches: Sequence[Sequence[int]]) -> list[int]:
        return [len(positions) for positions in micro_batches]

    def forward(self, update: int, index: int, batch: Batch) -> dict[str, Terms]:
        mask, channels = self._masks(update, index, batch)
        out = self._recognize(batch, mask, channels, micro_batch=(index, self.micro_batches))
        logits = torch.stack(list(out.logits.values()))
        ctc = ctc_loss(logits, *self._comparison(batch, out), self.vocabulary.blank)
        best = logits.detach().argmax(-1)
        blanks, frames = blank_frames(best, out.lengths, self.vocabulary.blank)
        terms: dict[str, Terms] = {}
        for arm, summed, blank in zip(out.logits, ctc.loss, blanks, strict=True):
            loss = summed
            if arm in out.commitment and self.section.rvq.commitment > 0:
                loss = loss + self.commitment_weight * out.commitment[arm]
            terms[self.names[arm]] = Terms(
                loss,
                {
                    "ctc_loss": (summed, ctc.utterances),
                    "zeroed": (ctc.zeroed, ctc.utterances),
                    "blank_rate": (blank, frames),
                },
            )
            if arm in out.sums:
                _accumulate(self.update_sums, arm, out.sums[arm])
        return terms

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept features and their frames, or the waveform and its samples."""
        if batch.features is None:
            return batch.waveform.to(self.device, non_blocking=True), batch.lengths
        encoder: Any = self.recognizer.encoder
        return batch.features.to(self.device, non_blocking=True), encoder.frames(batch.lengths)

    def _recognize(self, batch: Batch, *masks: Any, **position: Any) -> HeadBankOutput:
        values, lengths = self._inputs(batch)
        with autocast(self.context):
            if batch.features is not None:
                return self.recognizer.forward_features(values, lengths, **position)
            output: HeadBankOutput = self.recognizer(values, lengths, *masks, **position)
            return output

    def _masks(
        self, update: int, index: int, batch: Batch
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Time and channel masks, where the encoder is in train mode."""
        options = self.section.masking
        if self.recognizer.encoder_mode == "frozen_eval":
            return None, None
        encoder: Any = self.recognizer.encoder
        total = encoder.frames(batch.waveform.shape[1])
        frames = [encoder.frames(int(length)) for length in batch.lengths]
        if self.section.input_length == "padded":
            frames = [total] * len(frames)
        mask = channels = None
        if options.probability > 0:
            mask = torch.from_numpy(
                span_mask(
                    frames,
                    total,
                    probability=options.probability,
                    length=options.length,
                    min_spans=options.min_spans,
                    spans_drawn=options.spans_drawn,
                    rng=generator(self.seed, "mask", update, index),
                )
            )
        if options.channel_probability > 0:
            channels = torch.from_numpy(
                channel_mask(
                    len(frames),
                    encoder.config.width,
                    probability=options.channel_probability,
                    length=options.channel_length,
                    rng=generator(self.seed, "channel mask", update, index),
                )
            )
        return mask, channels

    def _comparison(
        self, batch: Batch, out: HeadBankOutput
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids of a batch, concatenated; frames and tokens of each utterance [B]."""
        ids = [self.vocabulary.encode(text) for text in batch.texts]
        flat = [token for tokens in ids for token in tokens]
        sizes = torch.tensor([len(tokens) for tokens in ids])
        return torch.tensor(flat, dtype=torch.int64), out.lengths, sizes

    def end_update(self, update: int, ranks: Ranks) -> None:
        bank = self.recognizer.heads.quantizers
        if bank is None:
            return
        if self.section.rvq.ema == "update":
            ranks.sum_(bank.pending())
            bank.apply_update()
        for arm in self.recognizer.heads.quantized_arms:
            sums = self.update_sums.get(arm) or self._no_sums(arm)
            ranks.sum_(sums.tensors())
            _accumulate(self.window, arm, sums)

    def _no_sums(self, arm: str) -> CodeSums:
        """What an idle rank adds."""
        levels = self.recognizer.heads.arms[arm]
        codes = self.section.rvq.codes
        return CodeSums(
            torch.zeros(levels, dtype=torch.float64, device=self.device),
            torch.zeros(levels, codes, dtype=torch.int64, device=self.device),
        )

    def values(self, update: int, learner: Learner) -> Row:
        sums = self.window.pop(learner.run.arm, None)
        return {} if sums is None else _rvq_columns(sums)

    # -------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, update: int, ranks: Ranks) -> dict[str, Row]:
        """CTC loss, error rates and blank rate over the whole validation set."""
        self.recognizer.eval()
        order = self._validation_order()
        parts = over_batches(
            len(self.valid),
            self.section.validation.batch_size,
            ranks,
            lambda _, places: self.valid.collate([order[i] for i in places]).pinned(self.device),
            self._validate_batch,
            self.context.recipe.compute,
        )
        references = [self.vocabulary.normalize(text) for text in self.valid.texts]
        rows: dict[str, Row] = {}
        for arm in self.recognizer.heads.arms:
            found = _Validated.join([part[arm] for part in parts])
            said = dict(zip(order, found.hypotheses, strict=True))
            found.hypotheses = [said[position] for position in range(len(order))]
            self.last_valid[arm] = found
            rows[self.names[arm]] = {
                "ctc_loss": found.loss / len(references),
                "wer": word_errors(references, found.hypotheses).rate,
                "cer": character_errors(references, found.hypotheses).rate,
                "blank_rate": found.blanks / max(1, found.frames),
                "zeroed": found.zeroed,
                "audio_seconds": self.valid.seconds,
                **({} if found.sums is None else _rvq_columns(found.sums)),
            }
        return rows

    def _validation_order(self) -> list[int]:
        """Positions in the order they are validated in: that of the set, or by length where batches
        of a group-norm encoder give what each utterance gives alone, so that little is padded."""
        encoder: Any = self.recognizer.encoder
        positions = range(len(self.valid))
        if self.valid.features is not None or not self.recognizer.apart:
            return list(positions)
        if encoder.config.extractor != "group_norm":
            return list(positions)
        return sorted(positions, key=self.valid.cropped.tolist().__getitem__)

    def _validate_batch(self, batch: Batch) -> dict[str, _Validated]:
        out = self._recognize(batch)
        blank = self.vocabulary.blank
        logits = torch.stack(list(out.logits.values()))
        ctc = ctc_loss(logits, *self._comparison(batch, out), blank)
        sums = [tensor for arm in out.sums for tensor in out.sums[arm].tensors()]
        losses, best, *sums = on_the_host([ctc.loss, logits.argmax(-1), *sums])
        blanks, frames = blank_frames(best, out.lengths, blank)
        sums_by_arm = dict(zip(out.sums, zip(sums[::2], sums[1::2], strict=True), strict=True))
        found = {}
        for number, arm in enumerate(out.logits):
            decoded = greedy_decode(best[number], out.lengths, blank)
            found[arm] = _Validated(
                float(losses[number]),
                ctc.zeroed,
                int(blanks[number]),
                frames,
                [self.vocabulary.decode(ids) for ids in decoded],
                CodeSums(*sums_by_arm[arm]) if arm in sums_by_arm else None,
            )
        return found

    # ------------------------------------------------------------------------ state and the end

    def state(self, learner: Learner) -> dict[str, Any]:
        arm = learner.run.arm
        sums = self.window.get(arm)
        state: dict[str, Any] = {
            "arm": self.recognizer.heads.arm_state(arm),
            "window": None if sums is None else sums.tensors(),
        }
        if self.section.train != "head":
            state["encoder"] = self.recognizer.encoder.state_dict()
        return state

    def load_state(self, learner: Learner, state: dict[str, Any]) -> None:
        self.recognizer.heads.load_arm_state(learner.run.arm, state["arm"])
        if state["window"] is not None:
            self.window[learner.run.arm] = CodeSums(*state["window"])
        if "encoder" in state:
            self.recognizer.encoder.load_state_dict(state["encoder"])

    def drop(self, learner: Learner) -> None:
        self.recognizer.heads.drop(learner.run.arm)
        self.window.pop(learner.run.arm, None)

    def finish(self, learner: Learner) -> Outcome:
        arm, run = learner.run.arm, learner.run
        if arm not in self.last_valid:  # stopped between the last update and here
            self.validate(self.section.updates, self.context.ranks)
        found = self.last_valid[arm]
        if self.context.ranks.main:
            save_recognizer(run.model, self.recognizer, arm, blank=self.vocabulary.blank)
            self.vocabulary.save_tokenizer_files(run.model)
            write_text(run.hypotheses, self._hypotheses(found.hypotheses))
            if found.sums is not None:
                self._write_codes(run.codes, arm, found.sums)
        if not math.isfinite(found.loss):
            return "diverged"
        empty = sum(not hypothesis.strip() for hypothesis in found.hypotheses)
        return "all_blank" if empty > MOSTLY * len(found.hypotheses) else "ok"

    def _hypotheses(self, hypotheses: Sequence[str]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HYPOTHESES_COLUMNS)
        for name, reference, hypothesis in zip(
            self.valid.ids, self.valid.texts, hypotheses, strict=True
        ):
            reference = self.vocabulary.normalize(reference)
            errors = word_errors([reference], [hypothesis]).errors
            writer.writerow([name, reference, hypothesis, errors])
        return text.getvalue()

    def _write_codes(self, path: Path, arm: str, sums: CodeSums) -> None:
        """All levels: codebooks; counts, residual error, perplexity, dead codes on validation."""
        levels = sums.levels()
        content = io.BytesIO()
        np.savez_compressed(
            content,
            codebooks=self.recognizer.heads.arm_state(arm)["rvq.codebooks"].cpu().numpy(),
            code_counts=sums.counts.cpu().numpy(),
            mse=np.array([level.mse for level in levels]),
            perplexity=np.array([level.perplexity for level in levels]),
            dead_codes=np.array([level.dead_codes for level in levels]),
        )
        write_bytes(path, content.getvalue())


class _Validated:
    """One arm's validation: sums, hypotheses and code statistics of some batches."""

    def __init__(
        self,
        loss: float,
        zeroed: int,
        blanks: int,
        frames: int,
        hypotheses: list[str],
        sums: CodeSums | None,
    ) -> None:
        self.loss, self.zeroed, self.blanks, self.frames = loss, zeroed, blanks, frames
        self.hypotheses, self.sums = hypotheses, sums

    @classmethod
    def join(cls, parts: Sequence[_Validated]) -> _Validated:
        """Added up in the order given."""
        sums: dict[str, CodeSums] = {}
        for part in parts:
            if part.sums is not None:
                _accumulate(sums, "", part.sums)
        return cls(
            sum(part.loss for part in parts),
            sum(part.zeroed for part in parts),
            sum(part.blanks for part in parts),
            sum(part.frames for part in parts),
            [hypothesis for part in parts for hypothesis in part.hypotheses],
            sums.get(""),
        )


def _accumulate(total: dict[str, CodeSums], arm: str, sums: CodeSums) -> None:
    total[arm] = total[arm] + sums if arm in total else sums


def _rvq_columns(sums: CodeSums) -> Row:
    """The last level's statistics."""
    last = sums.levels()[-1]
    return {
        "rvq_mse": last.mse,
        "rvq_perplexity": last.perplexity,
        "rvq_dead_codes": last.dead_codes,
    }
