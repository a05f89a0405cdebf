"""What newer versions of our dependencies need from us, in one place, to be thrown away."""

from __future__ import annotations

import importlib
from types import ModuleType
from unittest import mock


def import_torchaudio(name: str = "torchaudio") -> ModuleType:
    """Import ``torchaudio`` or one of its submodules beside any torch it runs with.

    torchaudio 2.11, the last one, is built against torch's stable ABI and works with later
    releases. Its import refuses a torch whose CUDA *minor* version differs from its own (13.2 of
    torch 2.15 against 13.0), which matters to its CUDA kernels only; we use its Python modules.
    The check is passed over for the time of the import and nothing else is changed.
    """
    import torch

    with mock.patch.object(torch.version, "cuda", None):
        return importlib.import_module(name)
