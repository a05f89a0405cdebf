"""Weights in and out: Hugging Face's layout both ways, torchaudio's bundles in.

Strict, as `reproduce.model.folders` says.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reproduce.compat import import_torchaudio
from reproduce.errors import DataError
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.folders import (
    CONFIG,
    OWN,
    PICKLED,
    PREPROCESSOR,
    PROCESSOR,
    SAFETENSORS,
    Count,
    NonNegative,
    Positive,
    Share,
    key_problems,
    listed,
    load_strict,
    own_section,
    read_folder,
    require_kind,
    save_folder,
    wants_normalized,
)
from reproduce.model.pretrainer import PretrainingModel

PREFIX = "wav2vec2."
PINNED = {
    "facebook/wav2vec2-base": "0b5b8e868dd84f03fd87d01f9c4ff0f080fecfe8",
    "facebook/wav2vec2-base-960h": "22aad52d435eb6dbaf354bdad9b0da84ce7d6156",
}
"""Hub name -> the commit that is meant where ``NAME@COMMIT`` doesn't say otherwise."""

# Module of Encoder <-> of Hugging Face's Wav2Vec2Model, where they differ.
_RENAMED = (("transformer.", "encoder."), ("mask_embedding", "masked_spec_embed"))
# Argument of PretrainingModel -> key of Hugging Face's config.json and its default there.
_HEAD_KEYS = {
    "codebooks": ("num_codevector_groups", 2),
    "entries": ("num_codevectors_per_group", 320),
    "codevector_dim": ("codevector_dim", 256),
    "projection_dim": ("proj_codevector_dim", 256),
    "quantizer_dropout": ("feat_quantizer_dropout", 0.0),
    "temperature": ("contrastive_logits_temperature", 0.1),
}
_HEAD_KINDS: dict[str, Any] = {
    **dict.fromkeys(("codebooks", "entries", "codevector_dim", "projection_dim"), Count),
    "quantizer_dropout": Share,
    "temperature": Positive,
}
# Of our own section.
_OWN_KINDS: dict[str, Any] = {
    "diversity": Literal["entropy", "perplexity"],
    "remove_collisions": bool,
}


def encoder_config_to_huggingface(config: EncoderConfig) -> dict[str, Any]:
    """The encoder's keys of a Hugging Face config.json."""
    return config.to_huggingface()


def encoder_state_to_huggingface(encoder: Encoder, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The encoder's weights under Hugging Face's names, on the CPU, detached."""
    state = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in _RENAMED:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        state[prefix + name] = value.detach().cpu().contiguous()
    return state


def save_huggingface(
    model: PretrainingModel, folder: str | Path, *, extra_config: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json, as
    ``Wav2Vec2ForPreTraining`` and ``Wav2Vec2FeatureExtractor`` read them.

    Args:
        model: the model, on any device.
        folder: made if absent; each file appears whole or not at all.
        extra_config: more keys of config.json, such as ``num_negatives`` or ``mask_time_prob``.
    """
    config = model.encoder.config.to_huggingface() | {
        "architectures": ["Wav2Vec2ForPreTraining"],
        "num_codevector_groups": model.quantizer.groups,
        "num_codevectors_per_group": model.quantizer.entries,
        "codevector_dim": model.quantizer.codevector_dim,
        "proj_codevector_dim": model.project_hid.out_features,
        "feat_quantizer_dropout": model.dropout_features.p,
        "contrastive_logits_temperature": model.temperature,
        OWN: {key: getattr(model, key) for key in _OWN_KINDS}
        | {"extractor_gradient": model.encoder.config.extractor_gradient},
    }
    state = encoder_state_to_huggingface(model.encoder)
    for name, value in model.state_dict().items():
        if not name.startswith("encoder."):
            state[name] = value.detach().cpu().contiguous()
    normalized = model.encoder.config.normalized
    save_folder(folder, config | dict(extra_config or {}), state, normalized=normalized)


def load_pretraining_model(path: str | Path) -> PretrainingModel:
    """A pretraining model in eval mode, on the CPU.

    Args:
        path: a Hugging Face folder of ``Wav2Vec2ForPreTraining`` or a finished run's ``model/``.

    Raises:
        DataError: no such folder, another kind of model, or weights that don't fit.
    """
    folder = Path(path)
    config, state = read_folder(folder)
    require_kind("pretraining model", state, folder)
    own, head = own_section(config, folder), {}
    kinds = {key: _HEAD_KINDS[name] for name, (key, _) in _HEAD_KEYS.items()}
    problems = key_problems(config, kinds) + key_problems(own, _OWN_KINDS)
    if problems:
        raise DataError("; ".join(problems), where=str(folder / CONFIG))
    head = {name: config.get(key, default) for name, (key, default) in _HEAD_KEYS.items()}
    head |= {key: own[key] for key in _OWN_KINDS if key in own}
    encoder = encoder_config_of(config, folder)
    encoder_state, rest = _split(state)
    state = {f"encoder.{name}": value for name, value in encoder_state.items()} | rest
    try:
        return load_strict(lambda: PretrainingModel(encoder, **head), state, where=str(folder))
    except ValueError as error:
        raise DataError(str(error), where=str(folder / CONFIG)) from error


def load_encoder(path_or_name: str | Path) -> Encoder:
    """An encoder in eval mode, on the CPU: ``features, lengths = encoder(waveform, lengths=None)``.

    Args:
        path_or_name: a Hugging Face folder (bare, with the pretraining or a CTC head, or a finished
            run's ``model/``), a hub name ``OWNER/NAME@COMMIT`` (no commit for those in ``PINNED``),
            or a torchaudio bundle such as ``WAV2VEC2_BASE``.

    A mask embedding that the source lacks (torchaudio's models, some fine-tuned ones) is drawn from
    U(0, 1) with a fixed seed; it only matters for fine-tuning with masks.

    Raises:
        DataError: nothing of that name, no way to fetch it, another architecture, or weights that
            don't fit.
    """
    source = encoder_source(path_or_name)
    if isinstance(source, Path):
        return _encoder_of_folder(source)
    if isinstance(source, HubName):
        return _encoder_of_folder(_fetch(source))
    return _encoder_of_bundle(source)


@dataclass(frozen=True)
class HubName:
    """A repository of the Hugging Face hub at a commit."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"


def encoder_source(path_or_name: str | Path) -> Path | HubName | str:
    """What a name given to :func:`load_encoder` means: a folder, a hub name or a bundle's name.

    Looks at this machine's files only; nothing is read or fetched.

    Raises:
        DataError: none of them, or a hub name without a commit.
    """
    name = str(path_or_name)
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[A-Z][A-Z0-9_]+", name):
        return name
    if match := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.-]+))?", name):
        repository, commit = match[1], match[2] or PINNED.get(match[1])
        if commit is None:
            raise DataError(
                "no such folder, and as a hub name it lacks a commit",
                where=name,
                do=f"Name one, so that the run can be repeated: {repository}@COMMIT "
                f"(https://huggingface.co/{repository}/commits/main).",
            )
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise DataError(
                f"{commit!r} is not a commit: branches and tags move",
                where=name,
                do="Give its 40 hexadecimal digits, from "
                f"https://huggingface.co/{repository}/commits/{commit}.",
            )
        return HubName(repository, commit)
    raise DataError(
        "no such folder",
        where=name,
        do="Give a folder with config.json and weights, a hub name such as "
        "facebook/wav2vec2-base, or a torchaudio bundle such as WAV2VEC2_BASE.",
    )


def _encoder_of_folder(folder: Path) -> Encoder:
    return encoder_of(*read_folder(folder), folder)


def encoder_of(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> Encoder:
    """The encoder of a folder as :func:`read_folder` gave it, in eval mode.

    Raises:
        DataError: another architecture, or weights that don't fit.
    """
    shape = encoder_config_of(config, folder)
    weights, rest = _split(state)
    if not weights:  # a bare Wav2Vec2Model: no prefix, no head
        weights = {_our_name(name): value for name, value in rest.items()}
    if "mask_embedding" not in weights:
        weights["mask_embedding"] = _drawn_embedding(shape.width, str(folder))
    return load_strict(lambda: Encoder(shape), weights, where=str(folder))


def _encoder_of_bundle(name: str) -> Encoder:
    pipelines = import_torchaudio().pipelines
    bundle = getattr(pipelines, name, None)
    if not isinstance(bundle, pipelines.Wav2Vec2Bundle):
        known = [n for n in dir(pipelines) if n.startswith(("WAV2VEC2_", "HUBERT_"))]
        raise DataError(
            "neither a folder nor a torchaudio bundle",
            where=name,
            do=f"Bundles: {listed(known, 40)}.",
        )
    try:
        model = bundle.get_model()
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"torchaudio can't fetch the bundle: {error}",
            where=name,
            do="Run once with a network, or put the file that it names into "
            f"{torch.hub.get_dir()}/checkpoints.",
        ) from error
    encoder = Encoder.from_torchaudio(model, where=name)
    with torch.no_grad():
        encoder.mask_embedding.copy_(_drawn_embedding(encoder.config.width, name))
    return encoder.eval()


def _fetch(name: HubName) -> Path:
    """The hub's files of an encoder, from its cache where they are there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = name.repository, name.commit
    try:
        config = hf_hub_download(repository, CONFIG, revision=revision)
        for file in (PREPROCESSOR, PROCESSOR):
            try:
                hf_hub_download(repository, file, revision=revision)
            except LocalEntryNotFoundError:  # offline
                absent = try_to_load_from_cache(repository, file, revision=revision)
                if file == PREPROCESSOR and absent is None:
                    text = "can't be fetched: taken to want normalized waveforms"
                    warnings.warn(f"{name}: its {file} {text}", stacklevel=3)
            except EntryNotFoundError:  # it has none
                pass
        try:
            hf_hub_download(repository, SAFETENSORS, revision=revision)
        except LocalEntryNotFoundError:  # offline, and not in the cache: the other one may be
            hf_hub_download(repository, PICKLED, revision=revision)
        except EntryNotFoundError:
            hf_hub_download(repository, PICKLED, revision=revision)
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        reason = str(error).strip().splitlines()
        raise DataError(
            f"can't be fetched: {type(error).__name__}: {reason[0] if reason else ''}",
            where=str(name),
            do=f"Put {CONFIG} and {SAFETENSORS} or {PICKLED} of https://huggingface.co/"
            f"{repository}/tree/{revision} into a folder, such as "
            f"models/{repository.split('/')[1]}, and name that.",
        ) from error
    return Path(config).parent


def encoder_config_of(config: Mapping[str, Any], folder: Path) -> EncoderConfig:
    """The encoder's shape as a folder's config.json says, and its input as it wants it.

    Raises:
        DataError: another architecture, values of other types, or another input than ours.
    """
    encoder = EncoderConfig.from_huggingface(config, where=str(folder / CONFIG))
    own = own_section(config, folder)
    if problems := key_problems(own, {"extractor_gradient": NonNegative}):
        raise DataError("; ".join(problems), where=f"{folder / CONFIG}: {OWN}")
    return dataclasses.replace(
        encoder,
        extractor_gradient=own.get("extractor_gradient", 1.0),
        normalized=wants_normalized(folder),
    )


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What Hugging Face's names say is the encoder's (under our names), and the rest (heads)."""
    encoder, rest = {}, {}
    for name, value in state.items():
        if name.startswith(PREFIX):
            encoder[_our_name(name.removeprefix(PREFIX))] = value
        else:
            rest[name] = value
    return encoder, rest


def _our_name(name: str) -> str:
    for ours, theirs in _RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _drawn_embedding(width: int, where: str) -> Tensor:
    warnings.warn(f"{where} has no mask embedding: drawn from U(0, 1)", stacklevel=3)
    return torch.rand(width, generator=torch.Generator().manual_seed(0))
