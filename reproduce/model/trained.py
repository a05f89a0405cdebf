"""Finished recognizers: one arm saved and loaded in Hugging Face's layout, and speech to text.

A recognizer without a quantizer is a plain ``Wav2Vec2ForCTC``. One with a quantizer is a model that
transformers doesn't know: `modeling_w2vrep.py` lies beside its weights and opens it there, and
transformers' own class refuses it instead of leaving the quantizer out.

Letters: T samples, F frames, V tokens.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reproduce.data.audio import SAMPLE_RATE, normalize, to_float
from reproduce.data.vocabulary import Decoder
from reproduce.errors import DataError
from reproduce.model import folders
from reproduce.model.encoder import Encoder
from reproduce.model.folders import OWN, QUANTIZED, Count, Natural, NonNegative, Share
from reproduce.model.interop import encoder_of, encoder_state_to_huggingface
from reproduce.model.recognizer import HeadBank, InputLength, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.objective.ctc import greedy_decode
from reproduce.records import write_bytes

CODE = "modeling_w2vrep.py"
"""What opens a quantized recognizer in transformers, beside its weights."""
WINDOW, MARGIN = 20.0, 2.0
"""Seconds: longer recordings are read in windows of this; so much on either side is context."""

_OWN_KINDS: dict[str, Any] = {
    "arm": str,
    "seed": Natural,
    "input_length": Literal["utterance", "padded"],
    "rvq": dict,
}
_RVQ_KINDS: dict[str, Any] = {
    "levels": Natural,
    "codes": Count,
    "decay": Share,
    "ema": Literal["micro_batch", "update"],
    "padding": bool,
    "kmeans_init": bool,
    "revive_below": NonNegative | None,
    "straight_through": bool,
}


class TrainedRecognizer(Recognizer):
    """A recognizer of one arm, in eval mode, that knows its characters.

    Attributes:
        arm: its only arm.
        folder: where it came from.
    """

    def __init__(self, encoder: Encoder, heads: HeadBank, folder: Path, **settings: Any) -> None:
        super().__init__(encoder, heads, **settings)
        (self.arm,) = heads.arms
        self.folder = folder
        self._decoder: Decoder | None = None
        self.eval()

    @property
    def decoder(self) -> Decoder:
        """Ids to text.

        Raises:
            DataError: the folder has no tokenizer files, or none that fit.
        """
        if self._decoder is None:
            self._decoder = _decoder(self.folder, self.heads.vocabulary_size)
        return self._decoder

    @torch.no_grad()
    def transcribe(
        self,
        waveform: Tensor | np.ndarray,
        *,
        window: float = WINDOW,
        margin: float = MARGIN,
    ) -> str:
        """The text of one recording of any length, greedily decoded.

        Args:
            waveform: [T] or [1, T] samples at 16 kHz, floats in -1..1 or int16. They are normalized
                here if the encoder wants that, each window by itself.
            window: s; longer recordings are read in windows of this.
            margin: s on either side of a window that serve as context alone.

        Raises:
            DataError: the folder it came from has no characters.
            ValueError: another shape, samples that aren't finite, or margins that fill the window.
        """
        self.eval()
        decoder = self.decoder
        logits = self._logits(_samples(waveform), window, margin)
        (ids,) = greedy_decode(logits.argmax(-1)[None], torch.tensor([len(logits)]), decoder.blank)
        return decoder.decode(ids)

    def _logits(self, samples: np.ndarray, window: float, margin: float) -> Tensor:
        """Float32 [T] -> [F, V] on the CPU, each frame from the window it lies deepest in."""
        encoder = self.encoder
        assert isinstance(encoder, Encoder)
        hop = math.prod(encoder.config.conv_strides)
        total = encoder.frames(len(samples))
        frames, spare = (
            encoder.frames(round(window * SAMPLE_RATE)),
            round(margin * SAMPLE_RATE / hop),
        )
        if frames <= 2 * spare:
            raise ValueError(f"a window of {window} s leaves nothing between margins of {margin} s")
        parts, done, start = [], 0, 0
        while done < total:
            last = start + frames >= total
            start = max(0, total - frames) if last else start
            stop = len(samples) if last else round(start * hop + window * SAMPLE_RATE)
            kept = self._window(samples[start * hop : stop])
            end = total if last else start + frames - spare
            parts.append(kept[done - start : end - start])
            done, start = end, end - spare
        return torch.cat(parts) if parts else torch.zeros(0, self.heads.vocabulary_size)

    def _window(self, samples: np.ndarray) -> Tensor:
        """Float32 [T] -> [F, V] on the CPU."""
        encoder = self.encoder
        assert isinstance(encoder, Encoder)
        wanted = normalize(samples) if encoder.config.normalized else samples
        device = next(self.parameters()).device
        output = self(torch.from_numpy(wanted)[None].to(device))
        logits: Tensor = output.logits[self.arm][0]
        return logits.float().cpu()


def _samples(waveform: Tensor | np.ndarray) -> np.ndarray:
    """Float32 [T]."""
    values = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else waveform
    if values.ndim == 2 and len(values) == 1:
        values = values[0]
    if values.ndim != 1:
        raise ValueError(f"one recording is wanted, [T] or [1, T]; found {list(values.shape)}")
    if values.dtype == np.int16:
        return to_float(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"floats or int16 are wanted, found {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError("the waveform has samples that aren't finite")
    return np.ascontiguousarray(values, dtype=np.float32)


def _decoder(folder: Path, size: int) -> Decoder:
    vocabulary = folders.read_object(folder / "vocab.json")
    if vocabulary is None:
        raise DataError(
            "no vocab.json: its characters aren't known",
            where=str(folder),
            do="Put the tokenizer's vocab.json and tokenizer_config.json beside the weights.",
        )
    names = (folders.read_object(folder / "special_tokens_map.json") or {}) | (
        folders.read_object(folder / "tokenizer_config.json") or {}
    )
    added = folders.read_object(folder / "added_tokens.json") or {}
    decoder = Decoder.of_tokenizer(vocabulary | added, names, where=str(folder / "vocab.json"))
    if decoder.blank >= size:
        raise DataError(
            f"the blank is {decoder.blank}, the head has {size} tokens",
            where=str(folder / "vocab.json"),
            do="Check that vocab.json belongs to these weights.",
        )
    return decoder


def save_recognizer(
    folder: str | Path, recognizer: Recognizer, arm: str, *, blank: int = 0
) -> None:
    """Write one arm as config.json, model.safetensors and preprocessor_config.json.

    Without a quantizer they are those of a ``Wav2Vec2ForCTC``. With one, its codebooks are among
    the weights as ``rvq.*``, and :data:`CODE` lies beside them.
    """
    encoder, heads = recognizer.encoder, recognizer.heads
    if not isinstance(encoder, Encoder):
        raise TypeError(f"can't save an encoder of type {type(encoder).__name__}")
    config = encoder.config.to_huggingface() | {
        "architectures": ["Wav2Vec2ForCTC"],
        "vocab_size": heads.vocabulary_size,
        "pad_token_id": blank,
        "final_dropout": heads.head_dropout,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
        OWN: {
            "extractor_gradient": encoder.config.extractor_gradient,
            "arm": arm,
            "seed": heads.seed,
            "input_length": recognizer.input_length,
            "rvq": dataclasses.asdict(heads.options) | {"levels": heads.arms[arm]},
        },
    }
    folder = Path(folder)
    if heads.arms[arm]:
        config = _refused_by_transformers(config)
        write_bytes(folder / CODE, Path(__file__).with_name(CODE).read_bytes())
    state = {name: value.cpu().contiguous() for name, value in heads.arm_state(arm).items()}
    state = encoder_state_to_huggingface(encoder) | state
    folders.save_folder(folder, config, state, normalized=encoder.config.normalized, processor=True)


def _refused_by_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a quantized model, which ``Wav2Vec2ForCTC`` mustn't take for its own.

    Of another ``model_type`` it would only warn. The one value that all its versions check, and
    name where it isn't known, says how to open the model; the true one is in our section.
    """
    norm, module = config["feat_extract_norm"], CODE.removesuffix(".py")
    return config | {
        "model_type": QUANTIZED,
        "architectures": ["Wav2Vec2ForQuantizedCTC"],
        "auto_map": {
            "AutoConfig": f"{module}.QuantizedWav2Vec2Config",
            "AutoModelForCTC": f"{module}.Wav2Vec2ForQuantizedCTC",
        },
        "feat_extract_norm": f"{norm}, with a residual quantizer before the head: open it with "
        "AutoModelForCTC.from_pretrained(PATH, trust_remote_code=True)",
        OWN: config[OWN] | {"feat_extract_norm": norm},
    }


def load_recognizer(folder: str | Path) -> TrainedRecognizer:
    """What :func:`save_recognizer` wrote, or any ``Wav2Vec2ForCTC`` folder: one arm, in eval mode.

    Raises:
        DataError: no such folder, another kind of model in it, or weights that don't fit.
    """
    folder = Path(folder)
    config, weights = folders.read_folder(folder)
    folders.require_kind("recognizer", weights, folder)
    own = folders.own_section(config, folder)
    problems = folders.key_problems(config, {"final_dropout": Share})
    problems += [f"{OWN}.{text}" for text in folders.key_problems(own, _OWN_KINDS)]
    settings = dict(own["rvq"]) if isinstance(own.get("rvq"), dict) else {"padding": False}
    problems += [f"{OWN}.rvq.{text}" for text in folders.key_problems(settings, _RVQ_KINDS)]
    problems += [f"{OWN}.rvq.{key}: unknown" for key in settings.keys() - _RVQ_KINDS.keys()]
    if problems:
        raise DataError("; ".join(problems), where=str(folder / folders.CONFIG))
    head = {n: value for n, value in weights.items() if n.startswith(("lm_head.", "rvq."))}
    if "lm_head.weight" not in head or head["lm_head.weight"].ndim != 2:
        raise DataError("lm_head.weight isn't a matrix", where=str(folder))
    levels, arm = settings.pop("levels", 0), own.get("arm", "no_rvq")
    vocabulary_size, dim = head["lm_head.weight"].shape
    encoder = encoder_of(config, weights, folder)
    if dim != encoder.config.width:
        raise DataError(
            f"lm_head.weight reads {dim} features, the encoder gives {encoder.config.width}",
            where=str(folder),
        )
    heads = HeadBank(
        {arm: levels},
        dim,
        vocabulary_size,
        seed=own.get("seed", 0),
        head_dropout=config.get("final_dropout", 0.0),
        options=RvqOptions(**settings),
    )
    heads.load_arm_state(arm, head)
    length: InputLength = own.get("input_length", "utterance")
    return TrainedRecognizer(encoder, heads, folder, input_length=length)
