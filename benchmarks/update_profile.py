"""Where the processor time of pretraining updates goes, by kind of operation.

    python benchmarks/update_profile.py corrected+mini --work DIR --arm no_icsl_8cb
    python benchmarks/update_profile.py corrected+mini --work DIR --shapes --most 40

DIR is a work folder that `w2vrep prepare` made. Updates are real ones, in the stage's own loop: the
recipe's batches, loss and optimizer, on one thread; reading ahead happens in another and isn't in
it. Every second update each operation that torch dispatches is timed, less what a view takes, which
does nothing; the others tell what an update takes unwatched. It is the thread's processor time that
counts, which goes on alike whether or not other processes want the core (though not its cache).
What is left of an unwatched update is Python and autograd between the operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loops import copy_of_data, run_updates
from machine import describe, spread
from torch.utils._python_dispatch import TorchDispatchMode

from reproduce.recipe import load_recipe
from reproduce.training import distributed

KINDS = {
    "matrix products": "mm addmm addmm_ bmm baddbmm",
    "GELU": "gelu gelu_backward",
    "layer norm": "native_layer_norm native_layer_norm_backward",
    "softmax": "_softmax _softmax_backward_data logsumexp",
    "FFT": "_fft_r2c _fft_c2r unfold_backward",
    "random numbers": "random_ uniform_ log_ neg_ lt",
    "optimizer": "_fused_adamw_ _foreach_div_ _foreach_mul_ _foreach_norm",
    "copies": "copy_ _to_copy clone cat stack fill_ zero_ new_zeros zeros index_copy index_copy_",
    "sums": "sum mean argmax linalg_vector_norm",
    "gathering": "gather index_select scatter_add_ index_add_ index embedding",
    "element by element": "add add_ mul mul_ sub div exp eq where masked_fill masked_fill_ square",
}


class Watch(TorchDispatchMode):
    """Processor time and calls of each operation, by name or by name and shapes."""

    def __init__(self, shapes: bool) -> None:
        super().__init__()
        self.shapes = shapes
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        started = time.thread_time()
        result = func(*args, **kwargs)
        seconds = time.thread_time() - started
        name = func.overloadpacket.__name__
        if self.shapes and name != "view":
            tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
            name += " " + " ".join(str(list(tensor.shape)) for tensor in tensors)
        self.seconds[name] += seconds
        self.calls[name] += 1
        return result


def kind_of(operation: str) -> str:
    name = operation.split()[0]
    return next((kind for kind, names in KINDS.items() if name in names.split()), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arm", default="no_icsl_8cb")
    parser.add_argument("--updates", type=int, default=10, help="watched, and as many unwatched")
    parser.add_argument("--warm", type=int, default=2, help="updates that don't count")
    parser.add_argument("--most", type=int, default=12, help="operations to list")
    parser.add_argument("--shapes", action="store_true", help="list operations by shapes too")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    sets = ["compute.threads=1", f"pretrain.updates={options.warm + 2 * options.updates}"]
    recipe = load_recipe(options.recipe, [*sets, *options.set])
    ranks = distributed.start("cpu")
    watch = Watch(options.shapes)
    times: list[float] = []
    done = 0

    def around(update: Callable[[], int]) -> int:
        nonlocal done
        done += 1
        if done > options.warm and (done - options.warm) % 2:
            with watch:
                return update()
        started = time.thread_time()
        number = update()
        if done > options.warm:
            times.append(time.thread_time() - started)
        return number

    with copy_of_data(options.work) as copy:
        run_updates(recipe, copy, ranks, "pretrain", options.arm, around)

    whole = 1000 * statistics.median(times)
    idle = watch.seconds["view"] / watch.calls["view"]
    each = {
        name: 1000 * max(0.0, watch.seconds[name] - idle * calls) / options.updates
        for name, calls in watch.calls.items()
    }
    kinds: Counter[str] = Counter()
    for name, milliseconds in each.items():
        kinds[kind_of(name)] += milliseconds
    kinds["between operations"] = whole - sum(each.values())
    print("| operations | ms an update | share |\n|---|---|---|")
    for kind, milliseconds in kinds.most_common():
        print(f"| {kind} | {milliseconds:.1f} | {100 * milliseconds / whole:.1f} % |")
    print("\n| operation | calls | ms an update | share |\n|---|---|---|---|")
    for name in sorted(each, key=lambda name: -each[name])[: options.most]:
        calls, share = watch.calls[name] / options.updates, 100 * each[name] / whole
        print(f"| `{name}` | {calls:.0f} | {each[name]:.1f} | {share:.1f} % |")
    print(
        f"\n{options.recipe}, {options.arm}: {spread(times)} s of the processor an update;"
        f" {options.updates} watched and as many unwatched, in turns."
        f" {describe(ranks.device, ['torch', 'numpy'])}"
    )


if __name__ == "__main__":
    main()
