"""Gumbel product quantizer.

N frames, C input channels, G codebooks of V entries, D dimension of all codebooks together.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from reproduce.model.precision import full_precision

MAX_CODEBOOKS = 32


class QuantizerOutput(NamedTuple):
    """Attributes:
    codevectors: chosen entries, concatenated over codebooks [N, D].
    codes: index of the chosen entries [N, G] int64.
    mean_probabilities: use of the entries over the counted frames [G, V]: of the softmax without
        noise in train mode (differentiable), of the codes in eval mode.
    """

    codevectors: Tensor
    codes: Tensor
    mean_probabilities: Tensor


class GumbelQuantizer(nn.Module):
    """Picks one of V entries in each of G codebooks (wav2vec 2.0, sect. 2; Jang et al. 2016).

    Train mode samples with Gumbel noise, hard forwards and soft backwards (straight-through); eval
    mode takes the largest logit. Parameters as in transformers' ``Wav2Vec2GumbelVectorQuantizer``:
    ``codevectors`` [1, G V, D/G] and ``weight_proj``, which starts as normal(0, 1) without bias.

    Args:
        input_dim: C.
        codebooks: G, 1 to 32.
        entries: V, at least 2.
        codevector_dim: D, a multiple of G.
        init: codevectors drawn from U(0, 1), as transformers does, or N(0, 1).

    Raises:
        ValueError: values that don't fit together.
    """

    def __init__(
        self,
        input_dim: int,
        codebooks: int,
        entries: int,
        codevector_dim: int,
        init: Literal["uniform", "normal"] = "uniform",
    ) -> None:
        super().__init__()
        if not 1 <= codebooks <= MAX_CODEBOOKS:
            raise ValueError(f"{codebooks} codebooks: 1 to {MAX_CODEBOOKS} are supported")
        if entries < 2:
            raise ValueError(f"{entries} entries a codebook: at least 2 are needed")
        if codevector_dim % codebooks:
            raise ValueError(f"codevector_dim {codevector_dim} isn't a multiple of {codebooks}")
        if init not in ("uniform", "normal"):
            raise ValueError(f"unknown init {init!r}: uniform or normal")
        self.groups, self.entries, self.codevector_dim = codebooks, entries, codevector_dim
        self.weight_proj = nn.Linear(input_dim, codebooks * entries)
        self.codevectors = nn.Parameter(
            torch.empty(1, codebooks * entries, codevector_dim // codebooks)
        )
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)
        (nn.init.uniform_ if init == "uniform" else nn.init.normal_)(self.codevectors)

    def codebooks(self) -> Tensor:
        """The entries [G, V, D/G], a differentiable view of the parameter."""
        return self.codevectors.view(self.groups, self.entries, -1)

    def forward(
        self,
        inputs: Tensor,
        temperature: float = 2.0,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        counted: Tensor | None = None,
    ) -> QuantizerOutput:
        """Quantize frames, in the precision of the parameters.

        Args:
            inputs: frames [N, C].
            temperature: of the Gumbel softmax; train mode only.
            noise: Gumbel noise [N, G, V] for train mode; None: drawn.
            generator: draws the noise, on its own device; None: torch's global stream. With a
                generator of its own the noise leaves dropout's stream the same for any G.
            counted: frames that count in ``mean_probabilities`` [N] bool; None: all.

        Raises:
            ValueError: noise of a wrong shape.
        """
        with full_precision(inputs.device):
            logits = self.weight_proj(inputs.to(self.weight_proj.weight.dtype))
            logits = logits.view(-1, self.groups, self.entries)
            if self.training:
                return self._sample(logits, temperature, noise, generator, counted)
            return self._choose(logits, counted)

    def _sample(
        self,
        logits: Tensor,
        temperature: float,
        noise: Tensor | None,
        generator: torch.Generator | None,
        counted: Tensor | None,
    ) -> QuantizerOutput:
        if noise is None:
            noise = gumbel_noise(logits, generator)
        elif noise.shape != logits.shape:
            raise ValueError(
                f"Gumbel noise {list(noise.shape)}; these frames need {list(logits.shape)}"
            )
        soft = ((logits + noise) / temperature).softmax(dim=-1)
        codes = soft.argmax(dim=-1)
        codevectors: Tensor = _StraightThrough.apply(soft, codes, self.codebooks())
        probabilities = logits.softmax(dim=-1)
        if counted is not None:
            probabilities = probabilities[counted]
        mean = probabilities.sum(dim=0) / max(len(probabilities), 1)
        return QuantizerOutput(codevectors, codes, mean)

    def _choose(self, logits: Tensor, counted: Tensor | None) -> QuantizerOutput:
        codes = logits.argmax(dim=-1)
        flat = codes + self.entries * torch.arange(self.groups, device=codes.device)
        codevectors = embedding(flat, self.codevectors[0]).flatten(1)
        used = (flat if counted is None else flat[counted]).flatten()
        counts = logits.new_zeros(self.groups * self.entries)
        counts.scatter_add_(0, used, torch.ones_like(used, dtype=counts.dtype))
        mean = counts.view(self.groups, self.entries) * (self.groups / max(len(used), 1))
        return QuantizerOutput(codevectors, codes, mean)


class _StraightThrough(torch.autograd.Function):
    """Entries [N, D] that codes [N, G] choose from codebooks [G, V, d].

    The codebooks' gradient is that of the hard choice, the soft choice's [N, G, V] that of the
    entries mixed by it.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        groups, entries, _ = codebooks.shape
        flat = codes + entries * torch.arange(groups, device=codes.device)
        ctx.save_for_backward(flat, codebooks)
        return embedding(flat, codebooks.flatten(0, 1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        flat, codebooks = ctx.saved_tensors
        gradient = gradient.view(len(gradient), len(codebooks), codebooks.shape[2])
        with full_precision(gradient.device):
            g_soft = (gradient.transpose(0, 1) @ codebooks.transpose(1, 2)).transpose(0, 1)
            g_entries = torch.zeros_like(codebooks).flatten(0, 1)
            g_entries.index_add_(0, flat.flatten(), gradient.flatten(0, 1))
        return g_soft, None, g_entries.view_as(codebooks)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, type and device of ``like``."""
    device = like.device if generator is None else generator.device
    draws = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device)
    draws.clamp_(min=torch.finfo(draws.dtype).tiny)  # 0 is drawn, 1 is not
    return draws.log_().neg_().log_().neg_().to(like.device)
