"""One pretraining update of ours beside transformers' Wav2Vec2ForPreTraining.

    python benchmarks/pretrain_step.py                        base model, 4 x 10 s, float32
    python benchmarks/pretrain_step.py --precision bf16       both under the same autocast
    python benchmarks/pretrain_step.py --size mini --seconds 4 --codebooks 8 --threads 1
                                                              a micro-batch of `corrected+mini`
    python benchmarks/pretrain_step.py --size tiny --seconds 2 --pairs 1     a try

An update is: draw mask and negatives, forward, backward, AdamW step. Both arms live in one process
with the same threads, allocator, dropout, autocast and optimizer, and take turns; a ratio is that
of two updates next to each other. The loss side is the same update without the encoder: outputs of
the encoder are given, their gradients are wanted. Peak memory is measured in a process for each.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from machine import describe, spread
from torch import Tensor, nn

from reproduce.compat import import_torchaudio
from reproduce.model.encoder import Encoder, EncoderConfig, EncoderOutput
from reproduce.model.masking import drop_lonely, sample_negatives, span_mask
from reproduce.model.precision import set_precision
from reproduce.model.pretrainer import PretrainingModel
from reproduce.objective.frames import Frames
from reproduce.recipe import load_recipe

NEGATIVES, SPAN, DIVERSITY, RATE = 100, 10, 0.1, 1e-4
NO_LAYER_DROP = {"layer_drop": 0.0}
TINY = {"conv_channels": (64,) * 7, "width": 96, "layers": 3, "heads": 4, "feed_forward": 384}


def encoder_config(options: argparse.Namespace) -> EncoderConfig:
    """The size with the study's dropouts; no layer is dropped, so that the work is equal."""
    if options.size == "mini":
        return EncoderConfig(**load_recipe("corrected+mini").model.model_dump() | NO_LAYER_DROP)
    return EncoderConfig(
        **(TINY if options.size == "tiny" else {}),
        activation_dropout=0.0,
        projection_dropout=0.1,
        **NO_LAYER_DROP,
    )


def quantizer_sizes(options: argparse.Namespace) -> dict[str, int]:
    """Codevectors and projections."""
    if options.size != "mini":
        return {"codevector_dim": 256, "projection_dim": 256}
    quantizer = load_recipe("corrected+mini").pretrain.quantizer
    return {name: getattr(quantizer, name) for name in ("codevector_dim", "projection_dim")}


class Arm:
    """A model, its optimizer, and one update of it."""

    def __init__(self, options: argparse.Namespace, codebooks: int, probability: float) -> None:
        torch.manual_seed(0)
        self.options, self.codebooks, self.probability = options, codebooks, probability
        self.device = torch.device(options.device)
        self.rng = np.random.default_rng(0)
        self.samples = round(options.seconds * 16000)
        self.frames = Encoder.frames(SimpleNamespace(config=encoder_config(options)), self.samples)
        waveform = torch.randn(options.batch, self.samples, generator=torch.Generator())
        self.waveform = waveform.to(self.device)
        self.model = self.build().to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, fused=True)

    def build(self) -> nn.Module:
        raise NotImplementedError

    def loss(self) -> Tensor:
        """Of freshly drawn masks and negatives."""
        raise NotImplementedError

    def without_encoder(self, features: Tensor, extracted: Tensor) -> None:
        """Put these in the place of the encoder's outputs."""
        raise NotImplementedError

    def update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def loss_side(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def autocast(self) -> AbstractContextManager[Any]:
        enabled = self.options.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


class Ours(Arm):
    def build(self) -> nn.Module:
        sizes = quantizer_sizes(self.options)
        model = PretrainingModel(encoder_config(self.options), codebooks=self.codebooks, **sizes)
        if self.options.compile:
            model.encoder.compile()
        return model

    def loss(self) -> Tensor:
        mask = span_mask(
            [self.frames] * self.options.batch,
            self.frames,
            probability=self.probability,
            length=SPAN,
            spans_drawn="batch",
            rng=self.rng,
        )
        mask = drop_lonely(mask)[0]
        negatives = sample_negatives(mask, NEGATIVES, self.rng)
        with self.autocast():
            out = self.model(
                self.waveform, mask=torch.from_numpy(mask), negatives=torch.from_numpy(negatives)
            )
        return (out.contrastive_loss + DIVERSITY * out.diversity_loss) / out.masked_frames

    def without_encoder(self, features: Tensor, extracted: Tensor) -> None:
        frames = self.frames

        class Given(nn.Module):
            def frames(self, samples: int) -> int:
                return frames

            def forward(
                self, waveform: Tensor, lengths: None, mask: Tensor, *, wanted: Frames
            ) -> EncoderOutput:
                return EncoderOutput(wanted.pick(features), torch.empty(0), extracted)

        self.model.encoder = Given()


class Theirs(Arm):
    def build(self) -> nn.Module:
        import_torchaudio()  # before transformers, which imports it too
        import transformers

        transformers.logging.set_verbosity_error()
        config = encoder_config(self.options).to_huggingface()
        config |= {"num_codevector_groups": self.codebooks, "diversity_loss_weight": DIVERSITY}
        sizes = quantizer_sizes(self.options)
        config["codevector_dim"] = sizes["codevector_dim"]
        config["proj_codevector_dim"] = sizes["projection_dim"]
        model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**config))
        if self.options.compile:
            model.wav2vec2.feature_extractor.compile(dynamic=True)
            for layer in model.wav2vec2.encoder.layers:
                layer.compile(dynamic=True)
        return model

    def loss(self) -> Tensor:
        from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs

        shape = (self.options.batch, self.frames)
        mask = theirs._compute_mask_indices(shape, self.probability, SPAN, min_masks=2)
        negatives = theirs._sample_negative_indices(shape, NEGATIVES, mask)
        with self.autocast():
            out = self.model(
                self.waveform,
                mask_time_indices=torch.from_numpy(mask).to(self.device),
                sampled_negative_indices=torch.from_numpy(negatives).to(self.device),
            )
        return out.loss / int(mask.sum())

    def without_encoder(self, features: Tensor, extracted: Tensor) -> None:
        from transformers.modeling_outputs import Wav2Vec2BaseModelOutput

        class Given(nn.Module):
            def forward(self, *_: Any, **__: Any) -> Any:
                return Wav2Vec2BaseModelOutput(
                    last_hidden_state=features, extract_features=extracted
                )

        self.model.wav2vec2 = Given()


ARMS: dict[str, type[Arm]] = {"ours": Ours, "transformers": Theirs}


def seconds(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall and processor time of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def in_turns(
    steps: dict[str, Callable[[], None]], pairs: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Times of each arm after some updates to warm up, the pairs in alternating order."""
    for step in steps.values():
        for _ in range(5 if device.type == "cuda" else 1):
            step()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for pair in range(pairs):
        names = list(steps)
        for name in names if pair % 2 == 0 else reversed(names):
            found[name].append(seconds(steps[name], device))
    return found


def ratios(found: dict[str, list[tuple[float, float]]], which: int) -> list[float]:
    pairs = zip(found["transformers"], found["ours"], strict=True)
    return [theirs[which] / ours[which] for theirs, ours in pairs]


def peak_memory(options: argparse.Namespace, codebooks: int, probability: float) -> dict[str, int]:
    """Peak of each arm after three updates in a process of its own, bytes."""
    found = {}
    for name in ARMS:
        command = [sys.executable, __file__, "--peak-of", name]
        command += ["--codebooks", str(codebooks), "--mask-probability", str(probability)]
        for option in ("batch", "seconds", "precision", "device", "size", "threads"):
            value = getattr(options, option)
            command += [] if value is None else [f"--{option}", str(value)]
        command += ["--compile"] if options.compile else []
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(printed.splitlines()[-1])
    return found


def own_peak(options: argparse.Namespace) -> int:
    import_torchaudio()
    import transformers  # noqa: F401  what the imports themselves take is the same for both

    arm = ARMS[options.peak_of](options, options.codebooks[0], options.mask_probability[0])
    for _ in range(3):
        arm.update()
    if arm.device.type == "cuda":
        return torch.cuda.max_memory_allocated(arm.device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak begins with that of the parent process on Linux
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(options: argparse.Namespace, codebooks: int, probability: float) -> str:
    """One row of the table."""
    device = torch.device(options.device)
    arms = {name: kind(options, codebooks, probability) for name, kind in ARMS.items()}
    whole = in_turns({name: arm.update for name, arm in arms.items()}, options.pairs, device)
    config, shape = encoder_config(options), (options.batch, arms["ours"].frames)
    for arm in arms.values():
        features = torch.randn(*shape, config.width, device=device, requires_grad=True)
        extracted = torch.randn(*shape, config.conv_channels[-1], device=device, requires_grad=True)
        arm.without_encoder(features, extracted)
    loss = in_turns(
        {name: arm.loss_side for name, arm in arms.items()}, max(5, options.pairs), device
    )
    del arms
    peaks = peak_memory(options, codebooks, probability) if not options.no_memory else {}

    def median(times: list[tuple[float, float]], digits: int = 2) -> str:
        return f"{statistics.median(wall for wall, _ in times):.{digits}f}"

    cells = [
        str(codebooks),
        str(probability),
        median(whole["transformers"]),
        median(whole["ours"]),
        spread(ratios(whole, 0)),
        spread(ratios(whole, 1)) if device.type == "cpu" else "",
        median(loss["transformers"], 3),
        median(loss["ours"], 4),
        spread(ratios(loss, 0), 1),
    ]
    if peaks:
        theirs, ours = (peaks[name] / 2**30 for name in ("transformers", "ours"))
        cells += [f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebooks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--mask-probability", type=float, nargs="+", default=[0.05, 0.65])
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=10.0, help="of an utterance")
    parser.add_argument("--pairs", type=int, help="default: 5, on a GPU 30")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["base", "mini", "tiny"], default="base")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile both encoders")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--peak-of", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.pairs = options.pairs or (30 if options.device.startswith("cuda") else 5)
    if options.threads:
        torch.set_num_threads(options.threads)
    set_precision(options.precision)
    if options.peak_of:
        print(json.dumps(own_peak(options)))
        return
    columns = ["G", "mask", "transformers, s", "ours, s", "ratio", "ratio of processor time"]
    columns += ["loss side: transformers, s", "ours, s", "ratio"]
    if not options.no_memory:
        columns += ["peak: transformers, GiB", "ours, GiB", "ours / theirs"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for codebooks in options.codebooks:
        for probability in options.mask_probability:
            print(measure(options, codebooks, probability), flush=True)
    model = f"{options.size} model, {options.batch} x {options.seconds:g} s, {options.precision}"
    model += ", compiled" if options.compile else ""
    where = describe(torch.device(options.device), ["torch", "torchaudio", "transformers", "numpy"])
    print(f"\n{model}; {options.pairs} pairs, median (smallest to largest). {where}.")


if __name__ == "__main__":
    main()
