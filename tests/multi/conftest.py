"""One work folder for all tests of processes; copy it to train in it."""

from __future__ import annotations

import pytest
from tiny_runs import make_work, train, warm_up

from reproduce.records import WorkFolder

warm_up()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """Prepared data and an encoder to fine-tune."""
    work = make_work(tmp_path_factory.mktemp("base"))
    train("pretrain", "corrected", work, "--arm", "no_icsl_2cb", "--set", "pretrain.updates=2")
    return work
