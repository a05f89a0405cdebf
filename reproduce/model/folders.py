"""Model folders in Hugging Face's layout: read without executing code, written whole.

Strict: whatever doesn't fit (a missing file, a value of another type, weights under other names, an
input that isn't ours) is a ``DataError`` that names it. Nothing here knows a model's modules.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reproduce.errors import DataError
from reproduce.records import MODEL_FILES, write_text

CONFIG, SAFETENSORS = MODEL_FILES
PICKLED = "pytorch_model.bin"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
OWN = "w2vrep"
"""config.json's section for what transformers doesn't know."""
QUANTIZED = "w2vrep_rvq"
"""``model_type`` of a recognizer whose quantizer transformers' own classes don't know."""

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Switch = bool | None
"""null is off, as it is to transformers' ``if``."""

Kind = Literal["recognizer", "pretraining model", "encoder"]
_OPENS: dict[Kind, str] = {
    "recognizer": "load_recognizer",
    "pretraining model": "load_pretraining_model",
    "encoder": "load_encoder",
}
# What Wav2Vec2FeatureExtractor fixes: key -> (the only value known here, transformers' default).
_INPUT: dict[str, Any] = {"sampling_rate": 16_000, "feature_size": 1, "padding_value": 0.0}
_INPUT_TYPE = "Wav2Vec2FeatureExtractor"
# Parameters as fairseq's wav2vec 2.0 names them.
_FAIRSEQ = re.compile(
    r"(^|\.)(mask_emb$|post_extract_proj\.|encoder\.pos_conv\.\d|quantizer\.vars$|final_proj\."
    r"|feature_extractor\.conv_layers\.\d+\.\d+\.|layers\.\d+\.self_attn\.)"
)
_NESTED = ("model", "state_dict", "model_state_dict")
"""Where trainers keep the weights in their checkpoints."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a Hugging Face folder, weight norm under its new names.

    Weights that a checkpoint nests under ``model`` or ``state_dict`` are taken from there.

    Raises:
        DataError: a file that is missing or can't be read, or weights that aren't names and
            tensors.
    """
    config = read_object(folder / CONFIG)
    if config is None:
        inner = folder / "model"
        do = f"Give a folder with {CONFIG} and {SAFETENSORS}."
        if (inner / CONFIG).exists():
            do = f"Its model is in {inner}."
        raise DataError(f"no {CONFIG}", where=str(folder), do=do)
    if config.get("model_type") == QUANTIZED:  # see trained.py
        config["model_type"] = "wav2vec2"
        own = own_section(config, folder)
        config["feat_extract_norm"] = own.get("feat_extract_norm")
    return config, {_modern(name): value for name, value in _read_weights(folder).items()}


def own_section(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Our section of config.json, empty if there is none.

    Raises:
        DataError: it isn't a JSON object.
    """
    own = config.get(OWN)
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise DataError(f"{OWN} is {_shown(own)}, not an object", where=str(folder / CONFIG))
    return own


def wants_normalized(folder: Path) -> bool:
    """Whether a model wants each utterance with zero mean and unit variance (``do_normalize``).

    As its preprocessor_config.json says (in newer folders, processor_config.json's
    ``feature_extractor``); without one yes, transformers' default. null is off.

    Raises:
        DataError: it wants an input that isn't ours, such as another sampling rate.
    """
    path = folder / PROCESSOR
    said = (read_object(path) or {}).get("feature_extractor")
    if said is None:
        path = folder / PREPROCESSOR
        said = read_object(path)
    if said is None:
        return True
    if not isinstance(said, dict):
        raise DataError(f"feature_extractor is {_shown(said)}, not an object", where=str(path))
    problems = key_problems(said, {"do_normalize": Switch})
    problems += [
        f"{key} is {_shown(said[key])}, known is {known}"
        for key, known in _INPUT.items()
        if key in said and (isinstance(said[key], bool) or said[key] != known)
    ]
    kind = said.get("feature_extractor_type", _INPUT_TYPE)
    if kind not in (_INPUT_TYPE, None):
        problems.append(f"feature_extractor_type is {_shown(kind)}, known is {_INPUT_TYPE}")
    if problems:
        raise DataError(
            "its input isn't 16 kHz waveforms as used here: " + "; ".join(problems),
            where=str(path),
            do="Give an encoder trained on 16 kHz; if the file is wrong, mend it.",
        )
    return bool(said.get("do_normalize", True))


def key_problems(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """What is wrong with the types of those keys that are there, a line each.

    Args:
        kinds: key -> a type, with pydantic's constraints; lists come as JSON has them.
    """
    problems = []
    for key in values.keys() & kinds.keys():
        try:
            TypeAdapter(kinds[key], config={"allow_inf_nan": False}).validate_python(
                values[key], strict=True
            )
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"]
            problems.append(f"{key} is {_shown(values[key])}: {said[0].lower()}{said[1:]}")
    return sorted(problems)


def kind_of(state: Mapping[str, Tensor]) -> Kind:
    """What weights under Hugging Face's names belong to."""
    names = tuple(state)
    if any(name.startswith("lm_head.") for name in names):
        return "recognizer"
    if any(name.startswith(("quantizer.", "project_hid.", "project_q.")) for name in names):
        return "pretraining model"
    return "encoder"


def require_kind(wanted: Kind, state: Mapping[str, Tensor], folder: Path) -> None:
    """Name the function that opens a folder of another kind.

    Raises:
        DataError: the weights belong to another kind of model.
    """
    found = kind_of(state)
    if found == wanted:
        return
    article = {"recognizer": "a recognizer", "encoder": "an encoder alone"}
    encoder = "" if found == "encoder" else ", or its encoder alone with load_encoder"
    raise DataError(
        f"this folder holds {article.get(found, f'a {found}')}, not a {wanted}",
        where=str(folder),
        do=f"Open it with {_OPENS[found]}{encoder}.",
    )


def load_strict(build: Callable[[], ModuleT], state: Mapping[str, Tensor], where: str) -> ModuleT:
    """Build a module and load weights that fit exactly, in eval mode.

    Nothing is allocated before the shapes are known to agree.

    Raises:
        DataError: with all that is missing, unexpected or of a wrong shape or type.
    """
    with torch.device("meta"):
        plan = build().state_dict()
    expected = {name: tuple(value.shape) for name, value in plan.items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    shapes = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    types = [
        f"{name} is {value.dtype}".replace("torch.", "")
        for name, value in state.items()
        if name in plan and plan[name].is_floating_point() and not value.is_floating_point()
    ]
    lists = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of a wrong shape": shapes,
        "no floating-point numbers": types,
    }
    problems = [f"{kind}: {listed(names)}" for kind, names in lists.items() if names]
    if problems:
        raise DataError(
            "weights don't fit: " + "; ".join(problems),
            where=where,
            do="Check that config.json belongs to these weights.",
        )
    module = build()
    module.load_state_dict(dict(state))
    return module.eval()


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    normalized: bool = True,
    processor: bool = False,
) -> None:
    """Write a model in Hugging Face's layout, each file whole or not at all.

    Args:
        normalized: whether it wants normalized waveforms, for preprocessor_config.json.
        processor: a tokenizer lies beside it, so that both make a ``Wav2Vec2Processor``.

    Raises:
        OSError: it can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{SAFETENSORS}.{os.getpid()}.tmp"
    try:
        save_file(dict(state), temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / SAFETENSORS)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    norm = config.get("feat_extract_norm", "group")
    preprocessor = {
        "feature_extractor_type": _INPUT_TYPE,
        **({"processor_class": "Wav2Vec2Processor"} if processor else {}),
        **_INPUT,
        "do_normalize": normalized,
        "padding_side": "right",
        # transformers gives models with a group-norm extractor none
        "return_attention_mask": not norm.startswith("group"),
    }
    for name, content in ((PREPROCESSOR, preprocessor), (CONFIG, config)):
        write_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Raises:
        DataError: it can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise DataError(f"{_shown(values)} is not a JSON object", where=str(path))
    return values


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in order, the first few."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_weights(folder: Path) -> dict[str, Tensor]:
    safetensors, pickled = folder / SAFETENSORS, folder / PICKLED
    path = safetensors if safetensors.exists() else pickled
    if not path.exists():
        raise DataError(
            f"neither {SAFETENSORS} nor {PICKLED}",
            where=str(folder),
            do="Weights split over several files aren't supported; save them as one.",
        )
    try:
        if path is safetensors:
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = str(error).strip().splitlines()
        raise DataError(
            f"weights can't be read: {reason[0] if reason else type(error).__name__}",
            where=str(path),
            do="Fetch the file again, or save the weights alone, as safetensors.",
        ) from error
    return _flat(loaded, path)


def _flat(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Names and tensors, and nothing else."""
    place = ""
    if isinstance(loaded, dict):
        place = next((key for key in _NESTED if isinstance(loaded.get(key), dict)), "")
    weights = loaded[place] if place else loaded
    inside = f"under {place!r} " if place else ""
    wanted = "names and tensors are wanted"
    if not isinstance(weights, dict):
        raise DataError(f"holds {_kind_name(weights)}; {wanted}", where=str(path))
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{inside}the entry {_shown(name)} is {_kind_name(value)}; {wanted}",
                where=str(path),
                do="Save the model's state_dict() alone, as safetensors.",
            )
    if theirs := [name for name in weights if _FAIRSEQ.search(name)]:
        raise DataError(
            f"weights under fairseq's names: {listed(theirs, 4)}",
            where=str(path),
            do="Convert them to Hugging Face's with transformers' "
            "convert_wav2vec2_original_pytorch_checkpoint_to_pytorch.py.",
        )
    return cast("dict[str, Tensor]", weights)


def _kind_name(value: Any) -> str:
    kind = type(value).__name__.lower()
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _modern(name: str) -> str:
    """weight_g and weight_v of the older weight norm under the newer one's names."""
    name = re.sub(r"\bweight_g$", "parametrizations.weight.original0", name)
    return re.sub(r"\bweight_v$", "parametrizations.weight.original1", name)
