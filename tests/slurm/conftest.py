"""Only who asks for the cluster (``-m slurm``) gets it: it takes minutes and starts daemons."""

from __future__ import annotations

import pytest
from one_node import missing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lacks = missing()
    reason = f"no SLURM of our own here, for want of {lacks}" if lacks else "only by -m slurm"
    for item in items:
        if item.get_closest_marker("slurm") and (lacks or "slurm" not in config.option.markexpr):
            item.add_marker(pytest.mark.skip(reason=reason))
