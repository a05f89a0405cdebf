"""The models: tensors in, tensors out; flat arguments, no recipe. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reproduce.model.interop import load_encoder as load_encoder
    from reproduce.model.interop import load_pretraining_model as load_pretraining_model

__all__ = ["load_encoder", "load_pretraining_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from reproduce.model import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
