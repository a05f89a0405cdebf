"""The models: tensors in, tensors out; flat arguments, no recipe. Importing this loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reproduce.model.interop import load_encoder as load_encoder
    from reproduce.model.interop import load_pretraining_model as load_pretraining_model
    from reproduce.model.trained import load_recognizer as load_recognizer

__all__ = ["load_encoder", "load_pretraining_model", "load_recognizer"]
_HOMES = {
    "load_encoder": "reproduce.model.interop",
    "load_pretraining_model": "reproduce.model.interop",
    "load_recognizer": "reproduce.model.trained",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
