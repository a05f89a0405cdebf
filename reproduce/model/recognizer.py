"""A recognizer: one wav2vec 2.0 encoder and a bank of heads, each [residual quantizer +] linear.

With a frozen encoder one pass of it feeds every arm of a seed, and each arm is trained as it would
be alone: its initial weights follow from (seed, arm), its statistics and state are its own.

Letters: B batch, T samples, F frames, D feature width, V tokens, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from reproduce.errors import DataError
from reproduce.model.codebook import CodeSums
from reproduce.model.encoder import Encoder
from reproduce.model.rvq import ResidualQuantizers, RvqOptions
from reproduce.position import derive_seed

EncoderMode = Literal["frozen_eval", "frozen_train", "trained"]
InputLength = Literal["utterance", "padded"]

HEAD_STD = 0.02
"""Initial standard deviation of head weights; biases are zero. As transformers' ``Wav2Vec2ForCTC``
initializes ``lm_head`` (``initializer_range``)."""


@dataclass(frozen=True)
class HeadBankOutput:
    """Result of :class:`HeadBank` and :class:`Recognizer`; the dicts go by arm.

    Attributes:
        logits: [B, F, V].
        lengths: [B] int64, frames that CTC is to see; where the lengths were given, best the CPU.
        commitment: scalar sum over frames, for arms with a quantizer; see ``QuantizedBank``.
        frames: frames behind ``commitment`` and ``sums``.
        codes: [B, F, L] int64, for arms with a quantizer; -1 at frames left out.
        sums: statistics of each level, for arms with a quantizer.
    """

    logits: dict[str, Tensor]
    lengths: Tensor
    commitment: dict[str, Tensor]
    frames: int
    codes: dict[str, Tensor]
    sums: dict[str, CodeSums]


class HeadBank(nn.Module):
    """Heads of several arms over the same features.

    Args:
        arms: name -> levels of its residual quantizer, 0 for none.
        dim: D.
        vocabulary_size: V.
        seed: with an arm's name it decides all that is random about the arm.
        head_dropout: before the linear layers in train mode; all arms share one draw from torch's
            global stream, so an arm's draw doesn't depend on which others there are.
        options: of the quantizers, the same for all arms.
    """

    def __init__(
        self,
        arms: Mapping[str, int],
        dim: int,
        vocabulary_size: int,
        *,
        seed: int,
        head_dropout: float = 0.0,
        options: RvqOptions | None = None,
    ) -> None:
        super().__init__()
        self.arms = dict(arms)
        self.dim, self.vocabulary_size, self.seed = dim, vocabulary_size, seed
        self.head_dropout = head_dropout
        self.options = options or RvqOptions()
        self.heads = nn.ModuleDict()
        for arm in arms:
            head = nn.Linear(dim, vocabulary_size)
            generator = torch.Generator().manual_seed(derive_seed(seed, "head", arm))
            nn.init.normal_(head.weight, std=HEAD_STD, generator=generator)
            nn.init.zeros_(head.bias)
            self.heads[_key(arm)] = head
        quantized = self.quantized_arms
        self.quantizers = (
            ResidualQuantizers(
                [arms[arm] for arm in quantized],
                dim,
                seeds=[derive_seed(seed, "rvq", arm) for arm in quantized],
                options=self.options,
            )
            if quantized
            else None
        )

    @property
    def quantized_arms(self) -> list[str]:
        """Arms with a residual quantizer, in the order of ``quantizers``."""
        return [arm for arm, levels in self.arms.items() if levels]

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        *,
        micro_batch: tuple[int, int] | None = None,
    ) -> HeadBankOutput:
        """Features [B, F, D] of one encoder pass through every arm.

        Args:
            lengths: [B] frames of each utterance. Frames beyond take part in the quantizers only
                if ``options.padding``.
            micro_batch: see :meth:`ResidualQuantizers.forward`.
        """
        inputs = dict.fromkeys(self.arms, features)
        commitment, codes, sums, frames = {}, {}, {}, 0
        if self.quantizers is not None:
            counted = None if self.options.padding else lengths
            bank = self.quantizers(features, counted, micro_batch=micro_batch)
            frames = bank.frames
            for index, arm in enumerate(self.quantized_arms):
                inputs[arm] = bank.quantized[index]
                commitment[arm] = bank.commitment[index]
                codes[arm], sums[arm] = bank.codes[index], bank.sums[index]
        if self.training and self.head_dropout:
            kept = nn.functional.dropout(torch.ones_like(features), self.head_dropout)
            inputs = {arm: values * kept for arm, values in inputs.items()}
        # Kept features may be in half precision.
        if not torch.is_autocast_enabled(features.device.type):
            inputs = {arm: values.to(self.head(arm).weight.dtype) for arm, values in inputs.items()}
        logits = {arm: self.head(arm)(values) for arm, values in inputs.items()}
        return HeadBankOutput(logits, lengths, commitment, frames, codes, sums)

    def head(self, arm: str) -> nn.Linear:
        """The linear layer of an arm."""
        return cast(nn.Linear, self.heads[_key(arm)])

    def arm_parameters(self, arm: str) -> list[nn.Parameter]:
        """What an optimizer of this arm alone trains. (Codebooks move by EMA, not by gradients.)"""
        return list(self.head(arm).parameters())

    def arm_state(self, arm: str) -> dict[str, Tensor]:
        """Copies of an arm's weights and codebooks: ``lm_head.*`` and, with a quantizer, ``rvq.*``.

        ``rvq.codebooks`` is [L, codes, D], first level first.
        """
        state = {f"lm_head.{k}": v.detach().clone() for k, v in self.head(arm).state_dict().items()}
        if self.quantizers is not None and self.arms[arm]:
            own = self.quantizers.arm_state(self.quantized_arms.index(arm))
            state |= {f"rvq.{name}": value for name, value in own.items()}
        return state

    def load_arm_state(self, arm: str, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`arm_state` gave.

        Raises:
            DataError: a tensor is missing, unexpected or of another shape.
        """
        head = {name: value for name, value in state.items() if not name.startswith("rvq.")}
        own = {n.removeprefix("rvq."): v for n, v in state.items() if n.startswith("rvq.")}
        expected = {f"lm_head.{k}": v.shape for k, v in self.head(arm).state_dict().items()}
        if {name: value.shape for name, value in head.items()} != expected or (
            own and not self.arms[arm]
        ):
            found = ", ".join(f"{name} {list(value.shape)}" for name, value in state.items())
            raise DataError(
                f"the head's tensors are {found or 'missing'}",
                where=f"arm {arm}",
                do=f"Wanted: a head of {self.vocabulary_size} tokens on {self.dim} features"
                f" and {self.arms[arm]} levels.",
            )
        if self.quantizers is not None and self.arms[arm]:
            self.quantizers.load_arm_state(self.quantized_arms.index(arm), own)
        self.head(arm).load_state_dict({n.removeprefix("lm_head."): v for n, v in head.items()})

    def drop(self, arm: str) -> None:
        """Take an arm out of the bank; the others go on as if it had never been there."""
        remaining = [name for name in self.quantized_arms if name != arm]
        if self.quantizers is not None and self.arms[arm]:
            kept = [self.quantized_arms.index(name) for name in remaining]
            self.quantizers = self.quantizers.select(kept) if kept else None
        del self.heads[_key(arm)], self.arms[arm]

    def alone(self, arm: str) -> HeadBank:
        """A bank of one arm with a copy of its weights and codebooks."""
        bank = HeadBank(
            {arm: self.arms[arm]},
            self.dim,
            self.vocabulary_size,
            seed=self.seed,
            head_dropout=self.head_dropout,
            options=self.options,
        ).to(self.head(arm).weight)
        bank.load_arm_state(arm, self.arm_state(arm))
        return bank.train(self.training)


def _key(arm: str) -> str:
    """Of an arm in a ModuleDict, which refuses dots and the names of its own attributes."""
    return "arm " + arm.replace("%", "%25").replace(".", "%2E")


class Recognizer(nn.Module):
    """An encoder and a bank of heads.

    Args:
        encoder: called as ``encoder(waveform, lengths, mask=..., channel_mask=...)``, gives
            features [B, F, D] and frame lengths [B].
        heads: the bank.
        encoder_mode: ``frozen_eval``: no gradient, and in eval mode (deterministic) even in
            training; ``frozen_train``: no gradient, but dropout as in training; ``trained``:
            gradients to whatever of it requires them. May be changed between updates.
        input_length: ``utterance``: each utterance's own frames; ``padded``: all frames of the
            padded batch, for CTC, attention and quantizers alike: nobody is told any lengths.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: HeadBank,
        *,
        encoder_mode: EncoderMode = "frozen_eval",
        input_length: InputLength = "utterance",
    ) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, heads
        self.encoder_mode: EncoderMode = encoder_mode
        self.input_length: InputLength = input_length
        self.train(self.training)

    def train(self, mode: bool = True) -> Recognizer:
        """Set train or eval mode; a ``frozen_eval`` encoder stays in eval mode."""
        super().train(mode)
        if self.encoder_mode == "frozen_eval":
            self.encoder.eval()
        return self

    def set_encoder_mode(self, mode: EncoderMode) -> None:
        """Change what happens to the encoder from now on."""
        self.encoder_mode = mode
        self.train(self.training)

    def encode(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Waveform [B, T], lengths [B] in samples -> features [B, F, D], frames [B] for CTC.

        The frames are on the CPU, or where the lengths were given: best on the CPU too.

        In eval mode the features don't depend on what else is in the batch: an encoder with
        layer-norm extractor heeds the lengths, and one with group-norm extractor is asked for each
        utterance ``apart``. In train mode its features depend on the padding, as in
        transformers; so they do where ``input_length`` or the quantizers count padding as speech.

        F is at least 1. An utterance too short for a frame has length 0 and zeros for features.
        """
        if isinstance(self.encoder, Encoder) and not self.encoder.frames(waveform.shape[1]):
            none = torch.zeros(len(waveform), dtype=torch.int64)
            return waveform.new_zeros(len(waveform), 1, self.encoder.config.width), none
        told = lengths if self.input_length == "utterance" else None
        frozen = self.encoder_mode != "trained"
        with torch.no_grad() if frozen else nullcontext():
            more: dict[str, bool] = {"apart": True} if self.apart else {}
            features, frames = self.encoder(
                waveform, told, mask=mask, channel_mask=channel_mask, **more
            )
        if told is None:
            frames = torch.full((len(features),), features.shape[1])
        return features, frames

    @property
    def apart(self) -> bool:
        """Whether utterances are encoded as if each were alone."""
        if self.encoder.training or self.heads.options.padding:
            return False
        return isinstance(self.encoder, Encoder) and self.input_length == "utterance"

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        *,
        micro_batch: tuple[int, int] | None = None,
    ) -> HeadBankOutput:
        """One pass of the encoder, and every arm on its features.

        Args:
            waveform: [B, T] float32, 16 kHz, normalized.
            lengths: [B] samples; None: all T.
            mask: [B, F] bool, frames masked in time; channel_mask: [B, D] bool.
            micro_batch: see :meth:`ResidualQuantizers.forward`.
        """
        features, frames = self.encode(waveform, lengths, mask, channel_mask)
        output: HeadBankOutput = self.heads(features, frames, micro_batch=micro_batch)
        return output

    def forward_features(
        self,
        features: Tensor,
        lengths: Tensor,
        *,
        micro_batch: tuple[int, int] | None = None,
    ) -> HeadBankOutput:
        """Every arm on kept features [B, F, D] with lengths [B] in frames."""
        if self.input_length == "padded":
            lengths = torch.full_like(lengths, features.shape[1])
        output: HeadBankOutput = self.heads(features, lengths, micro_batch=micro_batch)
        return output

    @property
    def needs_codebooks(self) -> bool:
        """Whether :meth:`initialize_codebooks` is due before training."""
        bank = self.heads.quantizers
        return bank is not None and not all(bank.initialized)

    @torch.no_grad()
    def initialize_codebooks(
        self, micro_batches: Iterable[tuple[Tensor, Tensor | None]], *, features: bool = False
    ) -> None:
        """k-means start of every arm from (waveform, samples) of the whole first update.

        The encoder is in eval mode, without masks. On several ranks every rank passes all
        micro-batches of the update, in the same order; then all have the same codebooks.

        Args:
            features: the pairs are (features [B, F, D], frames [B]) instead.
        """
        if self.heads.quantizers is None:
            return
        training, padding = self.training, self.heads.options.padding
        self.eval()
        rows = []
        for values, lengths in micro_batches:
            encoded, frames = (values, lengths) if features else self.encode(values, lengths)
            if padding or frames is None:
                rows.append(encoded.flatten(0, 1))
            else:
                rows += [row[:count] for row, count in zip(encoded, frames.tolist())]
        self.heads.quantizers.initialize(torch.cat(rows))
        self.train(training)
