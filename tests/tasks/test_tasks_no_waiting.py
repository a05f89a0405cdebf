"""Between the first forward and the last backward of an update nothing waits for a GPU.

Both stages run over tensors that claim to be on one: forward over fake CUDA tensors, whose every
operation is looked at; forward and backward over meta tensors, which have no values to wait for
(autograd has no queue for a GPU that isn't there).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from tasks_made import encoder_folder, made
from tiny_runs import make_work
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reproduce.model import quantizer
from reproduce.records import Stage, WorkFolder
from reproduce.training.distributed import Ranks
from reproduce.training.loop import _Totals

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


class Waited(AssertionError):
    """An operation for which the host waits."""


class Watch(TorchDispatchMode):
    """Fails on what waits for tensors of a device type, ``cuda`` (fake) or ``meta``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seen = 0
        self.fake: AbstractContextManager[Any] = nullcontext()
        if kind == "cuda":
            self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to = kwargs.get("device")
        places = {tensor.device.type for tensor in tensors}
        if to is not None:
            places.add(torch.device(to).type)
        if self.kind not in places or func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        self.seen += 1
        self._check(func, args, kwargs, places, tensors)
        if func is aten._ctc_loss.default:  # has no kernel for tensors without values
            log_probs, targets = args[:2]
            steps = 2 * targets.shape[1] + 1
            alpha = log_probs.new_empty(log_probs.shape[1], log_probs.shape[0], steps)
            return log_probs.new_empty(log_probs.shape[1]), alpha
        if func is aten._ctc_loss_backward.default:
            return torch.empty_like(args[1])
        with self.fake:
            return func(*args, **kwargs)

    def _check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: set[str],
        tensors: list[Tensor],
    ) -> None:
        if func in WAITS:
            raise Waited(str(func))
        if func in INDEXES:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or index.device.type == "cpu"):
                    raise Waited(f"{func} by {index.dtype} on {index.device}")
        if func in COPIES and len(places) > 1:
            waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:]))
            source = tensors[-1]
            into = source.device.type == "cpu"
            pinned = self.kind == "meta" or getattr(source, "in_pinned_memory", False)
            if waits or not into or not pinned:
                raise Waited(f"{func} from {source.device}, pinned: {pinned}, waits: {waits}")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Watch]:
    """Device type -> the watch, with stand-ins for what needs a real device."""

    def prepare(kind: str) -> Watch:
        autocast, enabled, generator = torch.autocast, torch.is_autocast_enabled, torch.Generator

        def pin(tensor: Tensor) -> Tensor:
            pinned = tensor.clone()
            pinned.in_pinned_memory = True  # type: ignore[attr-defined]
            return pinned

        if not torch.cuda.is_available():
            monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch, "Generator", lambda *_: generator())
        monkeypatch.setattr(quantizer, "gumbel_noise", lambda like, _: torch.rand_like(like))
        if kind == "meta":
            monkeypatch.setattr(
                torch,
                "autocast",
                lambda device, *a, **k: (
                    nullcontext() if device == "meta" else autocast(device, *a, **k)
                ),
            )
            monkeypatch.setattr(
                torch, "is_autocast_enabled", lambda device: device != "meta" and enabled(device)
            )
        return Watch(kind)

    return prepare


def moved(module: nn.Module, kind: str, watch: Watch) -> None:
    """Every parameter and buffer as an empty tensor of this device type."""
    with watch.fake:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=kind)
                    part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=kind)
                    part._buffers[name] = empty


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("no waiting"))


def run_update(stage: Stage, given: Any, update: int, watch: Watch) -> None:
    """What `Loop` does from an update's beginning to its sums over ranks, and its end."""
    kind, task = watch.kind, given.task
    device = torch.device(kind)
    ranks = Ranks(0, 1, device)
    task.context = dataclasses.replace(task.context, ranks=ranks)
    task.device = device
    if stage == "pretrain":
        moved(task.model, kind, watch)
    else:
        moved(task.recognizer, kind, watch)
        if task.recognizer.heads.quantizers is not None:  # k-means, once a run, may wait
            quantizers = task.recognizer.heads.quantizers
            quantizers.initialized = [True] * len(quantizers.levels)
    micro = given.plan.update(update)
    names = [learner.name for learner in given.learners]
    with watch:
        totals = _Totals(task.metric_names, names, device)
        task.begin_update(update, micro, task.look_ahead(update, micro, range(len(micro))))
        for index, positions in enumerate(micro):
            batch = given.speech.collate(positions).pinned(device)
            terms = task.forward(update, index, batch)
            loss = torch.stack([terms[name].loss for name in names]).sum()
            assert loss.requires_grad
            if kind == "meta":
                loss.backward()  # type: ignore[no-untyped-call]
            totals.add(terms)
        task.end_update(update, ranks)
    assert watch.seen > 100


CASES = [
    ("pretrain", "as-run", 1, "group_norm"),
    ("pretrain", "as-written", 1, "group_norm"),
    ("pretrain", "corrected", 1, "layer_norm"),
    ("finetune", "as-run", 1, "group_norm"),
    ("finetune", "as-written", 1, "layer_norm"),
    ("finetune", "corrected", 1, "group_norm"),  # frozen in train mode
    ("finetune", "corrected", 10, "layer_norm"),  # trained
]


@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize(("stage", "protocol", "update", "extractor"), CASES)
def test_an_update_waits_for_nothing(
    stage: Stage,
    protocol: str,
    update: int,
    kind: str,
    extractor: str,
    work: WorkFolder,
    on: Callable[[str], Watch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    sets = [f"model.extractor={extractor}", f"{stage}.accumulation=1"]
    if stage == "finetune":
        sets.append(f"finetune.encoder={encoder_folder(tmp_path, extractor)}")
    given = made(stage, protocol, work, monkeypatch, *sets)
    run_update(stage, given, update, on(kind))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.clone().masked_fill_(x > 0, 0).__setitem__(x > 0, 1.0),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),  # from pageable memory
        lambda x: x.copy_(torch.ones(3)),
        lambda x: (x > 0).nonzero(),
    ],
)
def test_the_watch_sees_what_waits(
    waiting: Callable[[Tensor], object], on: Callable[[str], Watch]
) -> None:
    watch = on("cuda")
    with watch.fake:
        values = torch.randn(3, device="cuda")
    with watch, pytest.raises(Waited):
        waiting(values)


def test_the_watch_lets_pass_what_does_not(on: Callable[[str], Watch]) -> None:
    watch = on("cuda")
    with watch:
        values = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert (values * torch.arange(3, device="cuda"))[1:].device.type == "cuda"
        assert torch.ones(3).sum().item() == 3.0
    assert watch.seen >= 3
