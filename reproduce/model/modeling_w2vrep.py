"""wav2vec 2.0 with a residual quantizer before its CTC head, for transformers.

Lies beside the weights of such a recognizer, so that
``AutoModelForCTC.from_pretrained(path, trust_remote_code=True)`` opens it where w2vrep isn't
installed. For inference: the codebooks don't move.

Letters: B batch, F frames, D feature width, L levels, V codes a level.
"""

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC


class QuantizedWav2Vec2Config(Wav2Vec2Config):
    """Of a ``Wav2Vec2ForCTC`` whose features pass a residual quantizer."""

    model_type = "w2vrep_rvq"


class ResidualQuantizer(torch.nn.Module):
    """Replaces each frame by the sum of the nearest codes of its residuals."""

    codebooks: torch.Tensor

    def __init__(self, levels: int, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(levels, codes, dim))
        # What training goes on from.
        self.register_buffer("cluster_size", torch.zeros(levels, codes))
        self.register_buffer("vector_sum", torch.zeros(levels, codes, dim))
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F, D] -> [B, F, D], computed in the codebooks' precision."""
        residual = features.flatten(0, 1).to(self.codebooks.dtype)
        quantized = torch.zeros_like(residual)
        for book in self.codebooks:
            distances = book.square().sum(-1) - 2 * residual @ book.T  # + |x|^2, the same for all
            chosen = book[distances.argmin(-1)]
            quantized, residual = quantized + chosen, residual - chosen
        return quantized.view_as(features).to(features.dtype)


class Wav2Vec2ForQuantizedCTC(Wav2Vec2ForCTC):
    """``Wav2Vec2ForCTC`` whose head reads quantized features."""

    config_class = QuantizedWav2Vec2Config

    def __init__(self, config: QuantizedWav2Vec2Config) -> None:
        # config.json says there how to open it, so that Wav2Vec2ForCTC refuses it
        refusal, config.feat_extract_norm = (
            config.feat_extract_norm,
            config.w2vrep["feat_extract_norm"],
        )
        super().__init__(config)
        config.feat_extract_norm = refusal
        rvq = config.w2vrep["rvq"]
        self.rvq = ResidualQuantizer(rvq["levels"], rvq["codes"], config.hidden_size)
        self.lm_head.register_forward_pre_hook(lambda _, inputs: (self.rvq(inputs[0]),))
