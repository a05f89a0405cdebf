"""wav2vec 2.0's encoder: torchaudio's modules hold the parameters, the forward is ours.

B utterances, T samples, F frames, C channels of the last convolution, D width.

The forward is our own because the time mask belongs between the feature projection and the zeroing
of padding, which torchaudio has in one private step. All names inside torchaudio's modules are used
in this file only.

Sources: wav2vec 2.0 (arXiv 2006.11477); values and padding as in transformers' ``Wav2Vec2Model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, pad
from torch.nn.utils.rnn import pad_sequence

from reproduce.compat import import_torchaudio
from reproduce.errors import DataError
from reproduce.model import operations
from reproduce.model.folders import Count, Share, Switch, key_problems
from reproduce.objective.frames import Frames, sent, valid_frames

Extractor = Literal["group_norm", "layer_norm"]

# Field of EncoderConfig -> key of Hugging Face's config.json.
_HUGGINGFACE_KEYS = {
    "conv_channels": "conv_dim",
    "conv_kernels": "conv_kernel",
    "conv_strides": "conv_stride",
    "conv_bias": "conv_bias",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "position_kernel": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
    "layer_norm_first": "do_stable_layer_norm",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "projection_dropout": "feat_proj_dropout",
    "layer_drop": "layerdrop",
}
_Counts = list[Count]
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("conv_channels", "conv_kernels", "conv_strides"), _Counts),
    **dict.fromkeys(("width", "layers", "heads", "feed_forward"), Count),
    **dict.fromkeys(("position_kernel", "position_groups"), Count),
    **dict.fromkeys(("conv_bias", "layer_norm_first"), Switch),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), Share),
    **dict.fromkeys(("projection_dropout", "layer_drop"), Share),
}
# What the architecture fixes: key -> the only value known here. null is off, where that is known.
_FIXED: dict[str, Any] = {
    "model_type": "wav2vec2",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
    "adapter_attn_dim": None,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder's shape and regularization. The defaults are transformers' (wav2vec 2.0 base).

    Attributes:
        extractor: ``group_norm``: one norm after the first convolution (base); ``layer_norm``: one
            after each (large on 60 k hours). Also decides on the attention mask, see `Encoder`.
        layer_norm_first: normalize before each block (``do_stable_layer_norm``).
        dropout: of hidden states in the transformer.
        projection_dropout: after the feature projection.
        layer_drop: probability to skip a transformer layer in training.
        extractor_gradient: factor on the gradient that reaches the convolutions (fairseq's
            ``feature_grad_mult``; 0.1 there for base, 1 in transformers).
        normalized: whether it wants each waveform with zero mean and unit variance; that is up to
            whoever calls it.
    """

    extractor: Extractor = "group_norm"
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    position_kernel: int = 128
    position_groups: int = 16
    layer_norm_first: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    projection_dropout: float = 0.0
    layer_drop: float = 0.1
    extractor_gradient: float = 1.0
    normalized: bool = True

    def __post_init__(self) -> None:
        for name in ("conv_channels", "conv_kernels", "conv_strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.conv_channels) == len(self.conv_kernels) == len(self.conv_strides) > 0:
            raise ValueError("conv_channels, conv_kernels and conv_strides differ in length")
        if self.extractor not in ("group_norm", "layer_norm"):
            raise ValueError(f"extractor {self.extractor!r}: group_norm or layer_norm")
        for divisor in ("heads", "position_groups"):
            if self.width % getattr(self, divisor):
                raise ValueError(f"width {self.width} isn't a multiple of {divisor}")

    @classmethod
    def base(cls) -> EncoderConfig:
        """wav2vec 2.0 base: 12 layers of 768."""
        return cls()

    @classmethod
    def large(cls) -> EncoderConfig:
        """wav2vec 2.0 large as trained on 60 k hours: 24 layers of 1024, layer norm throughout.

        Large as trained on LibriSpeech is this with ``extractor="group_norm"``, ``conv_bias=False``
        and ``layer_norm_first=False``. Dropouts stay at their defaults.
        """
        return cls(
            extractor="layer_norm",
            conv_bias=True,
            width=1024,
            layers=24,
            heads=16,
            feed_forward=4096,
            layer_norm_first=True,
        )

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], where: str = "config.json"
    ) -> EncoderConfig:
        """Read Hugging Face's configuration; absent keys have transformers' defaults.

        Raises:
            DataError: an architecture that isn't wav2vec 2.0's, or values of other types, with
                every deviation listed.
        """
        problems = [
            f"{key} is {config[key]!r}, known is {known!r}"
            for key, known in _FIXED.items()
            if config.get(key, known) != known and not (config[key] is None and known is False)
        ]
        norm = config.get("feat_extract_norm", "group")
        if norm not in ("group", "layer"):
            problems.append(f"feat_extract_norm is {norm!r}, known are 'group' and 'layer'")
        problems += key_problems(config, {key: _KINDS[o] for o, key in _HUGGINGFACE_KEYS.items()})
        if not problems:
            fields = {o: config[key] for o, key in _HUGGINGFACE_KEYS.items() if key in config}
            fields |= {name: bool(v) for name, v in fields.items() if _KINDS[name] is Switch}
            try:
                return cls(extractor="group_norm" if norm == "group" else "layer_norm", **fields)
            except ValueError as error:
                problems.append(str(error))
        raise DataError(
            "not a wav2vec 2.0 encoder: " + "; ".join(problems),
            where=where,
            do="Give the folder of a wav2vec 2.0 model (base, large) in Hugging Face layout.",
        )

    def to_huggingface(self) -> dict[str, Any]:
        """The keys of Hugging Face's config.json; ``extractor_gradient`` has none there."""
        config = {key: getattr(self, ours) for ours, key in _HUGGINGFACE_KEYS.items()}
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        config["feat_extract_norm"] = self.extractor.removesuffix("_norm")
        config["num_feat_extract_layers"] = len(self.conv_channels)
        return {key: known for key, known in _FIXED.items() if known is not None} | config


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder returns; unpacks as ``features, lengths = encoder(waveform)``.

    Attributes:
        features: outputs of the transformer [B, F, D], or of the wanted frames alone [N, D].
        lengths: valid frames of each utterance [B] int64, where the samples' lengths were given.
        extracted: normalized outputs of the convolutions [B, F, C], never masked: the quantizer's
            input.
    """

    features: Tensor
    lengths: Tensor
    extracted: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.features, self.lengths))


class Encoder(nn.Module):
    """wav2vec 2.0's convolutions and transformer.

    Padding is treated as transformers treats it: an encoder with ``layer_norm`` extractor zeroes
    padded frames and keeps attention off them, so that padding changes nothing; one with
    ``group_norm`` extractor was published without an attention mask, and what it computes depends
    on the (zero) padding, unless it is asked for utterances ``apart``.

    Initial weights are drawn from torch's global stream, as in transformers: normal(0, 0.02) for
    the transformer's linear layers, Kaiming normal for the convolutions, U(0, 1) for the mask
    embedding, torch's own default for the feature projection and the positional convolution (whose
    normal initialization has no effect in transformers: weight norm lies over it).

    Dropout draws from the global stream of its device, layer drop from that of the CPU.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        built = import_torchaudio().models.wav2vec2_model(
            extractor_mode=config.extractor,
            extractor_conv_layer_config=list(
                zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True)
            ),
            extractor_conv_bias=config.conv_bias,
            encoder_embed_dim=config.width,
            encoder_projection_dropout=config.projection_dropout,
            encoder_pos_conv_kernel=config.position_kernel,
            encoder_pos_conv_groups=config.position_groups,
            encoder_num_layers=config.layers,
            encoder_num_heads=config.heads,
            encoder_attention_dropout=config.attention_dropout,
            encoder_ff_interm_features=config.feed_forward,
            encoder_ff_interm_dropout=config.activation_dropout,
            encoder_dropout=config.dropout,
            encoder_layer_norm_first=config.layer_norm_first,
            encoder_layer_drop=config.layer_drop,
            aux_num_out=None,
        )
        self.feature_extractor: nn.Module = built.feature_extractor
        self.feature_projection: nn.Module = built.encoder.feature_projection
        self.transformer: nn.Module = built.encoder.transformer
        self.mask_embedding = nn.Parameter(torch.empty(config.width))
        self._initialize()

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        *,
        wanted: Frames | None = None,
        apart: bool = False,
    ) -> EncoderOutput:
        """Encode 16 kHz waveforms.

        Args:
            waveform: normalized samples [B, T], zero where padded.
            lengths: valid samples [B], best on the CPU, and so the masks; None: all of them.
            mask: frames whose projected features the mask embedding replaces [B, F] bool.
            channel_mask: channels set to zero in all frames [B, D] bool.
            wanted: frames whose outputs are wanted; None: all. The last layer attends from these
                only, and its feed-forward part sees no others: the same outputs for less work.
            apart: for ``group_norm`` too, each utterance as if it were alone: the norm is over its
                own samples, attention stays off padding, and padded frames are zero.

        Raises:
            ValueError: a mask or wanted frames whose shape doesn't fit.
        """
        batch, total = len(waveform), self.frames(waveform.shape[1])
        if mask is not None:
            check_mask(mask, (batch, total), "mask")
        if wanted is not None:
            check_mask(wanted.where, (batch, total), "wanted")
        device = waveform.device
        padded, group_norm = None, self.config.extractor == "group_norm"
        apart = apart and group_norm
        if apart and lengths is not None:
            extracted = self._extract_apart(waveform, lengths)
        else:
            extracted = self._extract(waveform)
        if lengths is None:
            frame_lengths = torch.full((batch,), total, device=device)
        else:
            frame_lengths = self.frames(lengths)
            if (apart or not group_norm) and bool((frame_lengths < total).any()):
                padded = sent(~valid_frames(frame_lengths, total), device)

        projection: Any = self.feature_projection
        hidden = self._dropout(projection.projection(extracted), self.config.projection_dropout)
        if mask is not None:
            embedding = self.mask_embedding.to(hidden.dtype)
            hidden = torch.where(sent(mask, device)[..., None], embedding, hidden)
        if channel_mask is not None:
            check_mask(channel_mask, (batch, hidden.shape[2]), "channel_mask")
            hidden = hidden.masked_fill(sent(channel_mask, device)[:, None], 0.0)
        features = self._transform(hidden, padded, wanted)
        if apart and padded is not None and wanted is None:
            features = features.masked_fill(padded[..., None], 0.0)
        return EncoderOutput(features, frame_lengths, extracted)

    @overload
    def frames(self, samples: int) -> int: ...
    @overload
    def frames(self, samples: Tensor) -> Tensor: ...
    def frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames that the convolutions make of so many samples; 0 for too few."""
        for kernel, stride in zip(self.config.conv_kernels, self.config.conv_strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples.clamp(min=0) if isinstance(samples, Tensor) else max(samples, 0)

    def compile(self, *, dynamic: bool = True, **options: Any) -> None:
        """torch.compile the convolutions and the transformer layer, in place; takes its options.

        One compiled layer serves all but the last, for inputs of any length, and dropped layers
        compile nothing anew. It has a variant for train and eval mode, with and without padding,
        for one utterance and more: as many as torch compiles by default, so that the last layer
        with its wanted frames is apart. Dropout then draws other numbers than it does uncompiled.
        """
        for name in ("_extract", "_layer", "_last_layer"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=dynamic, **options))

    def freeze_extractor(self) -> None:
        """No gradient for the convolutions, as transformers' ``freeze_feature_encoder``."""
        self.feature_extractor.requires_grad_(False)

    @classmethod
    def from_torchaudio(cls, model: nn.Module, where: str = "torchaudio model") -> Encoder:
        """Convert torchaudio's ``Wav2Vec2Model`` (also HuBERT's), as its bundles return it.

        The mask embedding, which torchaudio's model lacks, is drawn anew. Normalization of the
        waveform, which some bundles wrap around the model, is left to the caller: see
        ``config.normalized``.

        Raises:
            DataError: another architecture, such as WavLM.
        """
        wrapped: Any = getattr(model, "model", model)
        try:
            config = dataclasses.replace(
                _config_of_torchaudio(wrapped),
                normalized=bool(getattr(model, "normalize_waveform", False)),
            )
        except AttributeError as error:
            raise DataError(
                f"not a wav2vec 2.0 encoder ({error})",
                where=where,
                do="Give a WAV2VEC2_* or HUBERT_* bundle.",
            ) from error
        encoder = cls(config)
        for ours, theirs in (
            (encoder.feature_extractor, wrapped.feature_extractor),
            (encoder.feature_projection, wrapped.encoder.feature_projection),
            (encoder.transformer, wrapped.encoder.transformer),
        ):
            ours.load_state_dict(theirs.state_dict())
        return encoder

    def _extract_apart(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """[B, T], samples [B] -> normalized convolution outputs [B, F, C], of each as if alone.

        One by one where the convolutions go over utterances anyway.
        """
        if bool((lengths >= waveform.shape[1]).all()):
            return self._extract(waveform)
        if not operations.has_own_convolutions(waveform):
            steps = (lengths - self.config.conv_kernels[0]) // self.config.conv_strides[0] + 1
            return self._extract(waveform, sent(steps, waveform.device))
        channels = self.config.conv_channels[-1]
        rows = [
            self._extract(row[None, :length])[0]
            if self.frames(length)
            else row.new_zeros(0, channels)
            for row, length in zip(waveform, lengths.tolist(), strict=True)
        ]
        found = pad_sequence(rows, batch_first=True)
        return pad(found, (0, 0, 0, self.frames(waveform.shape[1]) - found.shape[1]))

    def _extract(self, waveform: Tensor, steps: Tensor | None = None) -> Tensor:
        """[B, T] -> normalized convolution outputs [B, F, C].

        Args:
            steps: outputs of the first convolution that the group norm is over [B]; None: all.
        """
        extractor: Any = self.feature_extractor
        projection: Any = self.feature_projection
        if operations.has_own_convolutions(waveform):
            hidden = self._convolve(waveform)
        else:
            first, *others = extractor.conv_layers
            hidden, before = first.conv(waveform[:, None]), first
            for block in others:
                hidden = operations.keep_convolutions(
                    _activate_convolve, before, block, hidden, steps
                )
                before, steps = block, None
            hidden = _activate(before, hidden, steps).transpose(1, 2)
        if self.config.extractor_gradient != 1.0:
            hidden = _ScaleGradient.apply(hidden, self.config.extractor_gradient)
        normalized: Tensor = projection.layer_norm(hidden)
        return normalized

    def _convolve(self, waveform: Tensor) -> Tensor:
        """The convolutions channels last: [B, T] -> [B, F, C]."""
        blocks: Any = self.feature_extractor.conv_layers
        first, norm = blocks[0], blocks[0].layer_norm
        grouped = self.config.extractor == "group_norm"
        hidden = waveform[..., None]
        if grouped:
            hidden = operations.normalized_convolution(
                waveform, first.conv.weight, norm.weight, norm.bias, norm.eps, first.stride
            )
        for number, block in enumerate(blocks):
            if number or not grouped:
                conv = block.conv
                hidden = operations.convolve(
                    hidden, conv.weight, conv.bias, block.stride, activate=number > 0
                )
            if not grouped:
                norm = block.layer_norm
                shape = norm.normalized_shape
                hidden = layer_norm(hidden, shape, norm.weight, norm.bias, norm.eps)
        return gelu(hidden)

    def _transform(self, hidden: Tensor, padded: Tensor | None, wanted: Frames | None) -> Tensor:
        """Positions and transformer layers over [B, F, D]; ``padded`` [B, F] bool or None.

        Returns all frames [B, F, D] or the wanted ones [N, D].
        """
        transformer: Any = self.transformer
        seen = None
        if padded is not None:
            hidden = hidden.masked_fill(padded[..., None], 0.0)
            seen = ~padded[:, None, None]
        hidden = hidden + self._positions(hidden)
        if not self.config.layer_norm_first:
            hidden = transformer.layer_norm(hidden)
        hidden = self._dropout(hidden, self.config.dropout)
        kept = [
            layer
            for layer, is_kept in zip(transformer.layers, self._kept_layers(), strict=True)
            if is_kept
        ]
        for layer in kept if wanted is None else kept[:-1]:
            hidden = self._layer(layer, hidden, seen)
        if wanted is not None:
            hidden = (
                self._last_layer(kept[-1], hidden, seen, wanted) if kept else wanted.pick(hidden)
            )
        if self.config.layer_norm_first:
            hidden = transformer.layer_norm(hidden)
        return hidden

    def _positions(self, hidden: Tensor) -> Tensor:
        """Positional convolution of [B, F, D]."""
        embed: Any = self.transformer.pos_conv_embed
        if operations.has_own_convolutions(hidden.detach()):
            groups = self.config.position_groups
            conv = embed.conv
            return gelu(operations.convolve_by_fft(hidden, conv.weight, conv.bias, groups))
        positions: Tensor = embed(hidden)
        return positions

    def _layer(self, layer: Any, hidden: Tensor, seen: Tensor | None) -> Tensor:
        """One transformer layer: [B, F, D] -> [B, F, D]."""
        return self._block(layer, hidden, seen, None)

    def _last_layer(
        self, layer: Any, hidden: Tensor, seen: Tensor | None, wanted: Frames
    ) -> Tensor:
        """One transformer layer: [B, F, D] -> [N, D] of the wanted frames."""
        return self._block(layer, hidden, seen, wanted)

    def _block(
        self, layer: Any, hidden: Tensor, seen: Tensor | None, wanted: Frames | None
    ) -> Tensor:
        config = self.config
        inputs = layer.layer_norm(hidden) if config.layer_norm_first else hidden
        attended = self._attend(layer.attention, inputs, seen, wanted)
        if wanted is not None:
            hidden = wanted.pick(hidden)
        hidden = hidden + self._dropout(attended, config.dropout)
        if config.layer_norm_first:
            return hidden + self._feed_forward(layer.feed_forward, layer.final_layer_norm(hidden))
        hidden = layer.layer_norm(hidden)
        normalized: Tensor = layer.final_layer_norm(
            hidden + self._feed_forward(layer.feed_forward, hidden)
        )
        return normalized

    def _attend(
        self, attention: Any, inputs: Tensor, seen: Tensor | None, wanted: Frames | None
    ) -> Tensor:
        """Self-attention: [B, F, D] -> [B, F, D], or [N, D] of the wanted frames."""
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        rate = self.config.attention_dropout if self.training else 0.0
        if wanted is None:
            query, key, value = (self._heads(part) for part in _fused(projections, inputs))
            attended = operations.attention(query, key, value, seen, rate)
            attended = attended.transpose(1, 2).flatten(2)
        else:
            query = self._heads(wanted.spread(attention.q_proj(wanted.pick(inputs))))
            key, value = (self._heads(part) for part in _fused(projections[1:], inputs))
            attended = operations.attention(query, key, value, seen, rate)
            attended = wanted.gather(attended.transpose(1, 2).flatten(2))
        projected: Tensor = attention.out_proj(attended)
        return projected

    def _heads(self, values: Tensor) -> Tensor:
        """[B, F, D] -> [B, H, F, D/H]."""
        heads = self.config.heads
        return values.view(*values.shape[:2], heads, self.config.width // heads).transpose(1, 2)

    def _feed_forward(self, block: Any, inputs: Tensor) -> Tensor:
        inner, outer = block.intermediate_dense, block.output_dense
        rate = self.config.activation_dropout if self.training else 0.0
        out = operations.feed_forward(
            inputs, inner.weight, inner.bias, outer.weight, outer.bias, rate
        )
        return self._dropout(out, self.config.dropout)

    def _dropout(self, values: Tensor, rate: float) -> Tensor:
        return operations.dropout(values, rate, self.training)

    def _kept_layers(self) -> list[bool]:
        """One draw a layer whatever the device and rate, in train mode only."""
        if not self.training:
            return [True] * self.config.layers
        kept: list[bool] = (torch.rand(self.config.layers) >= self.config.layer_drop).tolist()
        return kept

    @torch.no_grad()
    def _initialize(self) -> None:
        transformer: Any = self.transformer
        nn.init.uniform_(self.mask_embedding)
        for module in self.feature_extractor.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
        for module in transformer.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(transformer.pos_conv_embed.conv.bias)


def _activate(block: Any, convolved: Tensor, steps: Tensor | None) -> Tensor:
    """What follows a convolution: norm, if the block has one, over own steps [B], and GELU."""
    norm = block.layer_norm
    if norm is None:
        return gelu(convolved)
    if steps is None:
        return gelu(norm(convolved))
    return gelu(operations.own_group_norm(convolved, steps, norm.weight, norm.bias, norm.eps))


def _activate_convolve(before: Any, block: Any, convolved: Tensor, steps: Tensor | None) -> Tensor:
    """From the outputs of one block's convolution to those of the next one's [B, C, T]."""
    outputs: Tensor = block.conv(_activate(before, convolved, steps))
    return outputs


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def _fused(projections: list[nn.Linear], inputs: Tensor) -> tuple[Tensor, ...]:
    """Several linear layers over the same inputs as one."""
    weight = torch.cat([layer.weight for layer in projections])
    bias = torch.cat([layer.bias for layer in projections])
    return linear(inputs, weight, bias).chunk(len(projections), dim=-1)


def check_mask(mask: Tensor, shape: tuple[int, int], name: str) -> None:
    """Raises ValueError for a mask of another type or shape."""
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)}; these waveforms need bool {list(shape)}"
        )


def _config_of_torchaudio(model: Any) -> EncoderConfig:
    """Read the shape off torchaudio's modules. Raises AttributeError for another architecture."""
    blocks = model.feature_extractor.conv_layers
    transformer = model.encoder.transformer
    layer = transformer.layers[0]
    if not all(hasattr(layer.attention, name) for name in ("q_proj", "k_proj", "v_proj")):
        raise AttributeError(f"attention is {type(layer.attention).__name__}")
    group_norm = isinstance(blocks[0].layer_norm, nn.GroupNorm)
    return dataclasses.replace(
        EncoderConfig.base(),
        extractor="group_norm" if group_norm else "layer_norm",
        conv_channels=tuple(block.conv.out_channels for block in blocks),
        conv_kernels=tuple(block.kernel_size for block in blocks),
        conv_strides=tuple(block.stride for block in blocks),
        conv_bias=blocks[0].conv.bias is not None,
        width=transformer.pos_conv_embed.embed_dim,
        layers=len(transformer.layers),
        heads=layer.attention.num_heads,
        feed_forward=layer.feed_forward.intermediate_dense.out_features,
        position_kernel=transformer.pos_conv_embed.kernel_size,
        position_groups=transformer.pos_conv_embed.conv.groups,
        layer_norm_first=layer.layer_norm_first,
        dropout=transformer.dropout.p,
        attention_dropout=layer.attention.dropout,
        activation_dropout=layer.feed_forward.intermediate_dropout.p,
        projection_dropout=model.encoder.feature_projection.dropout.p,
        layer_drop=transformer.layer_drop,
    )
