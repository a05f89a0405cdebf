"""Where the shipped recipes and published results lie, installed or in a checkout."""

from __future__ import annotations

from pathlib import Path


def shipped(*parts: str) -> Path:
    """The path of something shipped with the package, such as ``shipped("recipes")``.

    A wheel holds ``recipes/`` and ``results/published/`` under ``reproduce/_shipped``; a checkout
    (and an editable install) has them beside the package.
    """
    package = Path(__file__).resolve().parent
    installed = package / "_shipped"
    root = installed if installed.is_dir() else package.parent
    return root.joinpath(*parts)
