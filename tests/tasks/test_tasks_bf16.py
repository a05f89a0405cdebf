"""What crosses a border in a bf16 run has the type that its other side counts on (CPU autocast).

bf16 stays inside the encoder and the heads: what quantizes, compares, adds up, is kept or is
trained is float32, counts are integers, and sums over frames float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks_made import encoder_folder, made
from tiny_runs import make_work
from torch import Tensor

from reproduce.model import pretrainer, recognizer
from reproduce.model.encoder import Encoder
from reproduce.model.precision import CONVOLUTIONS, PRODUCTS, set_precision
from reproduce.model.quantizer import GumbelQuantizer
from reproduce.model.recognizer import HeadBank
from reproduce.records import WorkFolder
from reproduce.tasks import pretraining, recognition
from reproduce.training.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
BF16, F32, F64, I64 = torch.bfloat16, torch.float32, torch.float64, torch.int64


@pytest.fixture(autouse=True)
def as_before() -> Any:
    switches = (PRODUCTS, *CONVOLUTIONS)
    before = [switch.fp32_precision for switch in switches]
    set_precision("bf16")
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("bf16"))


def leaves(value: Any) -> list[Tensor]:
    """Tensors in containers and in the dataclasses of this package."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return leaves(vars(value)) if hasattr(value, "__dataclass_fields__") else []


@pytest.fixture
def crossing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[Any]]]:
    """Watch functions: name -> types of their tensors, (given, returned)."""
    found: dict[str, list[Any]] = {}

    def watch(owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def spy(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            given = [leaf.dtype for leaf in leaves(list(args)) if leaf.is_floating_point()]
            found.setdefault(label, []).append((set(given), leaves(result)))
            return result

        monkeypatch.setattr(owner, name, spy)

    def start(**borders: tuple[Any, str]) -> dict[str, list[Any]]:
        for label, (owner, name) in borders.items():
            watch(owner, name, label)
        return found

    return start


def types(calls: list[Any]) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Floating types given and all types returned, over the calls."""
    given = set().union(*(before for before, _ in calls))
    return given, {leaf.dtype for _, after in calls for leaf in after}


def one_update(given: Any) -> list[Any]:
    """An update with its step: the terms of its micro-batches."""
    task, (learner, *_) = given.task, given.learners
    micro = given.plan.update(10)
    task.begin_update(10, micro, task.look_ahead(10, micro, range(len(micro))))
    found = []
    for index, positions in enumerate(micro):
        terms = task.forward(10, index, given.speech.collate(positions))
        torch.stack([part.loss for part in terms.values()]).sum().backward()
        found.append(terms)
    for parameter in learner.parameters:
        assert parameter.dtype == F32
        assert parameter.grad is None or parameter.grad.dtype == F32
    assert any(parameter.grad is not None for parameter in learner.parameters)
    learner.optimizer.step()
    states = learner.optimizer.state.values()
    assert {leaf.dtype for state in states for leaf in leaves(dict(state))} == {F32}
    task.end_update(10, ONE)
    return found


def assert_terms(terms: list[Any]) -> None:
    """Losses that the loop differentiates and adds up: float32; counts: integers."""
    for part in (part for made_here in terms for part in made_here.values()):
        assert part.loss.dtype == F32
        for total, count in part.metrics.values():
            for number in (total, count):
                if isinstance(number, Tensor):
                    assert number.dtype in (F32, I64)


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_pretraining(extractor: str, work: WorkFolder, crossing: Any, monkeypatch: Any) -> None:
    sets = [f"model.extractor={extractor}", "compute.precision=bf16"]
    given = made("pretrain", "corrected", work, monkeypatch, *sets)
    found = crossing(
        encoder=(Encoder, "forward"),
        layers=(Encoder, "_block"),
        quantizer=(GumbelQuantizer, "_sample"),
        comparison=(pretrainer, "contrastive"),
        diversity=(pretrainer, "diversity"),
        icsl=(pretraining, "icsl"),
    )
    assert_terms(one_update(given))
    # The waveform goes in; features and the convolutions' outputs come out (norms of a CPU's
    # autocast are in bf16, of a GPU's in float32: both are made float32 before the quantizer).
    assert types(found["encoder"]) == ({F32}, {BF16, I64})
    assert types(found["layers"]) == ({BF16}, {BF16})
    assert types(found["quantizer"]) == ({F32}, {F32, I64})
    assert types(found["comparison"]) == ({F32}, {F32, I64})
    assert types(found["diversity"]) == ({F32}, {F32})
    assert types(found["icsl"]) == ({F32}, {F32})


@pytest.mark.parametrize("protocol", ["as-run", "as-written", "corrected"])
def test_fine_tuning(
    protocol: str, work: WorkFolder, crossing: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    encoder = encoder_folder(tmp_path, "group_norm")
    sets = [f"finetune.encoder={encoder}", "compute.precision=bf16"]
    given = made("finetune", protocol, work, monkeypatch, *sets)
    found = crossing(
        heads=(HeadBank, "forward"),
        quantizers=(recognizer.ResidualQuantizers, "_walk"),
        initial=(recognizer.ResidualQuantizers, "_start"),
        ctc=(recognition, "ctc_loss"),
    )
    assert_terms(one_update(given))
    (features, *_), _ = zip(*found["heads"], strict=True)
    if protocol == "as-written":  # kept on disk
        assert given.speech.features.dtype == np.float32
        assert features == {F32}
    assert types(found["quantizers"]) == ({F32}, {F32, F64, I64})
    assert ("initial" in found) == (protocol == "corrected")
    assert types(found.get("initial", [({F32}, [])])) == ({F32}, set())
    heads = given.task.recognizer.heads
    for _, returned in found["heads"]:
        assert {leaf.dtype for leaf in returned} == {BF16, F32, F64, I64}
    assert types(found["ctc"]) == ({BF16}, {F32})
    for arm, sums in given.task.update_sums.items():
        assert (sums.squared_error.dtype, sums.counts.dtype) == (F64, I64)
        state = heads.arm_state(arm)
        assert {state[name].dtype for name in state if name.startswith("rvq.c")} == {F32}
    row = given.task.validate(10, ONE)
    assert all(np.isfinite(values["ctc_loss"]) for values in row.values())
