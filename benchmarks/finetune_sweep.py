"""Fine-tuning all RVQ arms: separate runs, as published, beside the bank and kept features.

    python benchmarks/finetune_sweep.py                       base model, 8 x 10 s, 6 and 18 arms
    python benchmarks/finetune_sweep.py --size tiny --batch 2 --seconds 2 --repeats 2     a try

A step is one micro-batch: features of a frozen encoder, residual quantizer with EMA codebooks,
linear head, CTC, backward, AdamW. *Separate*: each arm is a run of its own, with transformers'
encoder and vector-quantize-pytorch's ResidualVQ, as the study did it. *Bank*: one pass of our
encoder feeds all arms. *Kept*: each utterance is encoded once, by itself, and every step reads its
features from a file. All live in one process with the same threads, weights and waveforms, and take
turns; a ratio is that of times next to each other. The arms are no RVQ and 1, 2, 4, 8, 16 levels;
18 arms are these six three times, and 18 separate runs are counted as three times the six timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe, spread
from torch import nn
from torch.nn import functional as F

from reproduce.compat import import_torchaudio
from reproduce.data.features import FeatureFile
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.interop import encoder_state_to_huggingface
from reproduce.model.recognizer import HeadBank, HeadBankOutput, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.objective.ctc import blank_frames, ctc_loss

LEVELS = (0, 1, 2, 4, 8, 16)
TOKENS, CODES, RATE = 32, 256, 1e-4
TOKENS_A_SECOND = 14  # of read English
TINY = {"conv_channels": (64,) * 7, "width": 96, "layers": 3, "heads": 4, "feed_forward": 384}


class Setting:
    """What all ways of training share: encoder, waveforms, targets."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        config = EncoderConfig(
            **(TINY if options.size == "tiny" else {}), activation_dropout=0.0, layer_drop=0.0
        )
        self.encoder = Encoder(config).to(self.device)
        self.encoder.requires_grad_(False)
        samples = round(options.seconds * 16000)
        self.waveform = torch.randn(options.batch, samples).to(self.device)
        self.samples = torch.full((options.batch,), samples)
        self.frames = self.encoder.frames(samples)
        size = max(1, min(round(options.seconds * TOKENS_A_SECOND), self.frames // 2))
        self.targets = torch.randint(5, TOKENS, (options.batch, size)).to(self.device)
        self.sizes = torch.full((options.batch,), size)
        self.train = options.encoder_mode == "train"


class Separate:
    """One arm as the study ran it."""

    def __init__(self, setting: Setting, levels: int) -> None:
        import transformers
        from vector_quantize_pytorch import ResidualVQ

        self.setting = setting
        config = transformers.Wav2Vec2Config(**setting.encoder.config.to_huggingface())
        self.encoder = transformers.Wav2Vec2Model(config)
        state = encoder_state_to_huggingface(setting.encoder, prefix="")
        self.encoder.load_state_dict(state)
        self.encoder.to(setting.device).requires_grad_(False).train(setting.train)
        width = setting.encoder.config.width
        self.quantizer = None
        if levels:
            quantizer = ResidualVQ(
                dim=width, num_quantizers=levels, codebook_size=CODES, decay=0.99
            )
            self.quantizer = quantizer.to(setting.device).train()
        self.head = nn.Linear(width, TOKENS).to(setting.device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), RATE)

    def step(self) -> None:
        setting = self.setting
        self.optimizer.zero_grad()
        with torch.no_grad():
            features = self.encoder(setting.waveform).last_hidden_state
        if self.quantizer is not None:
            features = self.quantizer(features)[0]
        logits = self.head(features)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            setting.targets,
            torch.full_like(setting.sizes, logits.shape[1]),
            setting.sizes,
            zero_infinity=True,
        )
        loss.backward()
        self.optimizer.step()


class Bank:
    """All arms over one encoder, or over the features it left in a file."""

    def __init__(self, setting: Setting, arms: int, file: FeatureFile | None = None) -> None:
        self.setting, self.file = setting, file
        levels = {f"rvq_{number}": LEVELS[number % len(LEVELS)] for number in range(arms)}
        heads = HeadBank(
            levels,
            setting.encoder.config.width,
            TOKENS,
            seed=0,
            options=RvqOptions(codes=CODES, padding=False),
        )
        mode = "frozen_train" if setting.train else "frozen_eval"
        self.recognizer = Recognizer(setting.encoder, heads, encoder_mode=mode).to(setting.device)
        self.optimizers = {
            arm: torch.optim.AdamW(heads.arm_parameters(arm), RATE, fused=True) for arm in levels
        }

    def forward(self) -> HeadBankOutput:
        setting = self.setting
        if self.file is None:
            output: HeadBankOutput = self.recognizer(setting.waveform, setting.samples)
            return output
        features = self.file.collate(range(len(setting.samples))).to(setting.device)
        frames = torch.as_tensor(self.file.frames)
        return self.recognizer.forward_features(features, frames)

    def step(self) -> None:
        setting = self.setting
        self.recognizer.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        out = self.forward()
        logits = torch.stack(list(out.logits.values()))
        terms = ctc_loss(logits, setting.targets, out.lengths, setting.sizes)
        blank_frames(logits.detach().argmax(-1), out.lengths)  # as the stage logs it
        (terms.loss / terms.utterances).sum().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()


def encode_once(setting: Setting, file: FeatureFile) -> None:
    """Each utterance by itself, into the file."""
    setting.encoder.eval()
    file.begin()
    with torch.no_grad():
        for position, row in enumerate(setting.waveform):
            file.write(position, setting.encoder(row[None]).features[0])
    file.publish()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def separate_runs(setting: Setting) -> float:
    """Seconds of a step of each of the six arms, one model in memory at a time."""
    total = 0.0
    for levels in LEVELS:
        arm = Separate(setting, levels)
        total += seconds(arm.step, setting.device)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, nargs="+", default=[6, 18])
    parser.add_argument("--batch", type=int, default=8, help="utterances")
    parser.add_argument("--seconds", type=float, default=10.0, help="of an utterance")
    parser.add_argument("--epochs", type=int, default=30, help="that kept features are read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoder-mode", choices=["eval", "train"], default="eval")
    parser.add_argument("--keep", choices=["float32", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    import_torchaudio()  # before transformers, which imports it too
    setting = Setting(options)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, setting, Path(folder))
    model = f"{options.size} model, {options.batch} x {options.seconds:g} s, float32"
    model += f", encoder in {options.encoder_mode} mode, features kept in {options.keep}"
    packages = ["torch", "torchaudio", "transformers", "vector-quantize-pytorch"]
    print(f"\n{model}; {options.repeats} repeats, median (smallest to largest).", end=" ")
    print(f"{describe(setting.device, packages)}.")


def measure(options: argparse.Namespace, setting: Setting, folder: Path) -> None:
    """Warm everything up once, take turns, print the table."""
    frames = [setting.frames] * options.batch
    file = FeatureFile(folder / "kept", frames, setting.encoder.config.width, options.keep)
    encode_once(setting, file)
    banks = {arms: Bank(setting, arms) for arms in options.arms}
    kept = {arms: Bank(setting, arms, file) for arms in options.arms}
    works: dict[tuple[str, int], Callable[[], float]] = {
        ("separate", 6): lambda: separate_runs(setting),
        ("encode", 0): lambda: seconds(lambda: encode_once(setting, file), setting.device),
    }
    for name, group in (("bank", banks), ("kept", kept)):
        for arms, bank in group.items():
            works[name, arms] = lambda bank=bank: seconds(bank.step, setting.device)
    for work in works.values():
        work()
    found: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for repeat in range(options.repeats):
        for key in list(works) if repeat % 2 == 0 else list(works)[::-1]:
            found[key].append(works[key]())

    columns = ["arms", "separate, s", "bank, s", "ratio", "kept, s", "encoding once, s"]
    columns += [f"ratio over {options.epochs} epochs"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    encoding = found["encode", 0]
    for arms in options.arms:
        separate = [time * arms / 6 for time in found["separate", 6]]
        bank, read = found["bank", arms], found["kept", arms]
        ratios = [a / b for a, b in zip(separate, bank, strict=True)]
        epochs = options.epochs
        over_all = [
            epochs * a / (once + epochs * b)
            for a, b, once in zip(separate, read, encoding, strict=True)
        ]
        cells = [str(arms), f"{statistics.median(separate):.2f}", f"{statistics.median(bank):.2f}"]
        cells += [spread(ratios, 1), f"{statistics.median(read):.3f}"]
        cells += [f"{statistics.median(encoding):.2f}", spread(over_all, 0)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
