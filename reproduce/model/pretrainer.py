"""Pretraining: encoder, mask and quantizer to objective terms.

B utterances, T samples, F frames, N masked frames, K negatives, G codebooks of V entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from reproduce.model.encoder import Encoder, EncoderConfig, EncoderOutput, check_mask
from reproduce.model.operations import dropout
from reproduce.model.precision import exactly
from reproduce.model.quantizer import GumbelQuantizer
from reproduce.objective.contrastive import (
    Comparison,
    ContrastiveTerms,
    compare,
    contrastive,
    of_subset,
)
from reproduce.objective.diversity import DiversityForm, diversity, perplexity

GUMBEL_TEMPERATURE = 2.0
"""Where wav2vec 2.0 starts (appendix A)."""


@dataclass(frozen=True)
class PretrainingOutput:
    """Sums over the masked frames; the caller divides by their number over the whole update.

    Attributes:
        contrastive_loss: sum, nats.
        chance_loss: sum of ln(1 + kept negatives), nats: the contrastive loss of a model that knows
            nothing.
        diversity_loss: the diversity loss times ``masked_frames``, unweighted.
        masked_frames: N.
        perplexity: of code use, summed over codebooks as in transformers.
        negatives_kept: negatives left after collisions are removed, summed.
        codes: of the masked frames [N, G], in the row-major order of the mask.
        codevectors: of the masked frames [N, D].
        lengths: valid frames of each utterance [B].
        subset: contrastive terms of ``subset``, among themselves; None where it wasn't given.
    """

    contrastive_loss: Tensor
    chance_loss: Tensor
    diversity_loss: Tensor
    masked_frames: int
    perplexity: Tensor
    negatives_kept: Tensor
    codes: Tensor
    codevectors: Tensor
    lengths: Tensor
    subset: ContrastiveTerms | None = None


class PretrainingModel(nn.Module):
    """wav2vec 2.0 with its pretraining head (arXiv 2006.11477).

    The mathematics of transformers' ``Wav2Vec2ForPreTraining``, but only masked frames pass the
    last transformer layer and are quantized, projected and compared. Quantizer, similarities and
    losses are computed in the parameters' precision, without autocast and TF32. The quantizer's
    weights are drawn last, so that all other initial weights are the same for any number of
    codebooks.

    Args:
        encoder_config: the encoder's shape.
        codebooks: G, 1 to 32.
        entries: V.
        codevector_dim: of all codebooks together, a multiple of G.
        projection_dim: dimension in which predictions and targets are compared.
        codevector_init: U(0, 1) or N(0, 1) codevectors.
        quantizer_dropout: dropout of the quantizer's input.
        temperature: kappa, divides the cosines.
        diversity: form of the diversity loss, see :func:`reproduce.objective.diversity.diversity`.
        remove_collisions: leave out negatives whose codes equal the positive's.
    """

    def __init__(
        self,
        encoder_config: EncoderConfig,
        *,
        codebooks: int = 2,
        entries: int = 320,
        codevector_dim: int = 256,
        projection_dim: int = 256,
        codevector_init: Literal["uniform", "normal"] = "uniform",
        quantizer_dropout: float = 0.0,
        temperature: float = 0.1,
        diversity: DiversityForm = "perplexity",
        remove_collisions: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.diversity: DiversityForm = diversity
        self.remove_collisions = remove_collisions
        self.encoder = Encoder(encoder_config)
        self.dropout_features = nn.Dropout(quantizer_dropout)
        self.project_hid = nn.Linear(encoder_config.width, projection_dim)
        self.project_q = nn.Linear(codevector_dim, projection_dim)
        self.quantizer = GumbelQuantizer(
            encoder_config.conv_channels[-1], codebooks, entries, codevector_dim, codevector_init
        )

    def codebook_parameters(self) -> list[nn.Parameter]:
        """The parameters that the inter-codebook similarity loss acts on."""
        return [self.quantizer.codevectors]

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        negatives: Tensor | None = None,
        *,
        comparison: Comparison | None = None,
        subset: Comparison | None = None,
        gumbel_noise: Tensor | None = None,
        gumbel_temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> PretrainingOutput:
        """The terms of the loss for one batch.

        Lengths, mask and negatives are best on the CPU, wherever the model is: their indices are
        made where they are, and an accelerator needn't be waited for.

        Args:
            waveform: normalized 16 kHz samples [B, T], zero where padded.
            lengths: valid samples [B]; None: all of them.
            mask: masked frames [B, F] bool; an utterance may have none.
            negatives: int64 [B, F, K], read at masked frames, or [N, K] in the mask's row-major
                order: positions in 0..F-1 of the same utterance. Frames outside the mask are
                quantized too where drawn.
            comparison: what `compare` makes of mask and negatives, in their place.
            subset: some of the masked frames with negatives among them, compared beside the rest.
            gumbel_noise: noise of train mode [M, G, V] for the M frames that are quantized (the
                masked ones, if all negatives are masked frames); None: drawn.
            gumbel_temperature: of train mode; None: 2.0.
            generator: draws the noise; None: torch's global stream.

        Raises:
            ValueError: mask or negatives missing, of a wrong shape or outside the utterance.
        """
        device = waveform.device
        if comparison is None:
            if mask is None or negatives is None:
                raise ValueError("the loss needs mask and negatives")
            check_mask(mask, (len(waveform), self.encoder.frames(waveform.shape[1])), "mask")
            comparison = compare(mask, negatives, device)
        masked, quantized = comparison.masked, comparison.quantized
        counted = comparison.counted
        encoded: EncoderOutput = self.encoder(waveform, lengths, masked.where, wanted=masked)

        def compute(features: Tensor, extracted: Tensor) -> list[Tensor]:
            quantizer_output = self.quantizer(
                dropout(extracted, self.dropout_features.p, self.training),
                GUMBEL_TEMPERATURE if gumbel_temperature is None else gumbel_temperature,
                noise=gumbel_noise,
                generator=generator,
                counted=counted,
            )
            codevectors, codes, use = quantizer_output
            predictions = self.project_hid(features.to(self.project_hid.weight.dtype))
            targets = self.project_q(codevectors)
            compared = partial(
                contrastive,
                entries=self.quantizer.entries,
                temperature=self.temperature,
                remove_collisions=self.remove_collisions,
            )
            terms = compared(predictions, targets, codes, comparison)
            found = [terms.loss, terms.chance, terms.kept]
            if subset is not None:
                rows = of_subset(subset, comparison)
                part = compared(predictions[rows], targets[rows], codes[rows], subset)
                found += [part.loss, part.chance, part.kept]
            if counted is not None:
                codes, codevectors = codes[counted], codevectors[counted]
            spread = diversity(use, self.diversity) * terms.count
            return [codes, codevectors, spread, perplexity(use).sum(), *found]

        heads = (self.quantizer, self.project_hid, self.project_q)
        codes, codevectors, spread, used, *terms = exactly(
            compute,
            encoded.features,
            quantized.pick(encoded.extracted),
            parameters=[parameter for module in heads for parameter in module.parameters()],
        )
        loss, chance, kept = terms[:3]
        part = None
        if subset is not None:
            part = ContrastiveTerms(terms[3], terms[4], terms[5], len(subset.masked))
        return PretrainingOutput(
            contrastive_loss=loss,
            chance_loss=chance,
            diversity_loss=spread,
            masked_frames=len(masked),
            perplexity=used,
            negatives_kept=kept,
            codes=codes,
            codevectors=codevectors,
            lengths=encoded.lengths,
            subset=part,
        )
