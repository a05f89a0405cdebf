"""as-run, driven across an epoch's end, against a plain transcription of what was run.

The transcription trains transformers' ``Wav2Vec2ForPreTraining`` with one gradient accumulated in
place; ours is the pretraining stage itself with the recipe ``as-run`` in a tiny size. Both compute
in float64, so that what is left of a difference is no rounding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_work, tiny_recipe

from reproduce.data.batches import Batch, Speech
from reproduce.model.interop import save_huggingface
from reproduce.model.masking import sample_negatives, span_mask
from reproduce.model.quantizer import gumbel_noise
from reproduce.position import derive_seed, generator
from reproduce.recipe import load_recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.tasks import pretraining as stage
from reproduce.tasks.context import open_context
from reproduce.tasks.wiring import learning_rate_of, plan_of
from reproduce.training import distributed

transformers = pytest.importorskip("transformers")

SEED, TRAIN, BATCH, ACCUMULATION = 1, 13, 2, 4
UPDATES, PLANNED, WARMUP, PEAK = 5, 15, 2, 1e-3
"""An epoch: an update of 4 micro-batches, and one of 3 whose last is a single utterance."""
ENTRIES, NEGATIVES = 8, 10
SETS = [
    "model.dropout=0.0",
    "model.attention_dropout=0.0",
    "model.projection_dropout=0.0",
    f"pretrain.updates={UPDATES}",
    f"pretrain.schedule.length={PLANNED / UPDATES}",
    f"pretrain.schedule.warmup={WARMUP / PLANNED}",
    f"pretrain.optimizer.learning_rate={PEAK}",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("as-run"), train=TRAIN, valid=2)


def first_second(work: WorkFolder, speech: Speech, rows: list[int]) -> torch.Tensor:
    """The first second of utterances, each of zero mean and unit variance, zeros behind it."""
    pcm = np.fromfile(work.audio, dtype=np.int16)
    cut = []
    for row in rows:
        length = min(int(speech.samples[row]), 16_000)
        samples = pcm[speech.rows.at("offset", row) :][:length] / 32768
        cut.append((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))
    longest = max(map(len, cut))
    return torch.tensor(np.stack([np.pad(c, (0, longest - len(c))) for c in cut]))


def pair_similarity(codevectors: torch.Tensor, codebooks: int) -> torch.Tensor:
    """ICSL as run: the mean over pairs of the mean cosine of all entries of one with the other."""
    books = codevectors.view(codebooks, ENTRIES, -1)
    found = [
        torch.cosine_similarity(books[i][:, None], books[j][None], dim=-1).mean()
        for i in range(codebooks)
        for j in range(i + 1, codebooks)
    ]
    return torch.stack(found).mean()


def transcription(
    model: Any,
    work: WorkFolder,
    speech: Speech,
    monkeypatch: pytest.MonkeyPatch,
    *,
    codebooks: int,
    icsl: float,
    clip: float | None,
) -> list[float]:
    """The training loop as it was run; trains ``model`` in place, returns the gradient norms."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01
    )
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, PLANNED)
    completed, norms, epoch = 0, [], 0
    while True:
        order = [int(i) for i in generator(SEED, "shuffle", epoch).permutation(TRAIN)]
        loader = [order[i : i + BATCH] for i in range(0, TRAIN, BATCH)]
        assert len(loader[-1]) == 1
        for step, rows in enumerate(loader):
            position = (completed + 1, step % ACCUMULATION)
            waveform = first_second(work, speech, rows)
            frames = int(model._get_feat_extract_output_lengths(waveform.shape[1]))
            mask = span_mask(
                [frames] * len(rows),
                frames,
                probability=0.05,
                length=10,
                spans_drawn="batch",
                rng=generator(SEED, "mask", *position),
            )
            drawn = sample_negatives(mask, NEGATIVES, generator(SEED, "negatives", *position))
            negatives = np.zeros((*mask.shape, NEGATIVES), dtype=np.int64)
            negatives[mask] = drawn
            negatives += np.arange(len(rows))[:, None, None] * frames
            source = torch.Generator().manual_seed(derive_seed(SEED, "gumbel", *position))
            shape = (int(mask.sum()), codebooks, ENTRIES)
            noise = torch.zeros(*mask.shape, codebooks, ENTRIES, dtype=torch.float64)
            noise[torch.from_numpy(mask)] = gumbel_noise(noise.new_empty(shape), source)

            def gumbel_softmax(
                logits: torch.Tensor, tau: float, hard: bool, noise: torch.Tensor = noise
            ) -> torch.Tensor:
                soft = ((logits + noise.view_as(logits)) / tau).softmax(-1)
                hard_one = torch.nn.functional.one_hot(soft.argmax(-1), ENTRIES)
                return hard_one - soft.detach() + soft

            model.set_gumbel_temperature(max(2.0 * 0.999999**completed, 1.0))
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
                patch.setattr(torch.Tensor, "float", lambda self: self)  # stay in float64
                loss = model(
                    waveform,
                    mask_time_indices=torch.from_numpy(mask),
                    sampled_negative_indices=torch.from_numpy(negatives),
                ).loss
            similarity = pair_similarity(model.quantizer.codevectors, codebooks)
            if codebooks == 2:  # weight 100, outside the factor
                loss = loss / ACCUMULATION + icsl * similarity
            else:
                loss = (loss + icsl * similarity) / ACCUMULATION
            loss.backward()
            for parameter in model.parameters():
                parameter.grad *= 1 / mask.sum()
            if (step + 1) % ACCUMULATION == 0 or step == len(loader) - 1:
                most = math.inf if clip is None else clip
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), most)))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                completed += 1
                if completed == UPDATES:
                    return norms
        epoch += 1


@pytest.mark.parametrize(
    ("arm", "codebooks", "icsl", "clip"),
    [
        ("no_icsl_8cb", 8, 0.0, None),
        ("icsl_8cb", 8, 0.1, 1.0),
        ("icsl_2cb", 2, 100.0, 1.0),
    ],
)
def test_as_run_is_what_was_run(
    arm: str,
    codebooks: int,
    icsl: float,
    clip: float | None,
    work: WorkFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe("as-run", work, *SETS)
    section = recipe.pretrain_arm(arm)
    assert (section.optimizer.clip_norm, section.icsl.weight) == (clip, icsl)
    model = stage.build_model(recipe.model, section, SEED)
    save_huggingface(model, tmp_path / "initial")
    reference = transformers.Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "initial")
    reference.double().train()
    model.double()

    context = open_context(recipe, work, distributed.start("cpu"), "pretrain")
    speech = stage.speech_of(context, section, "train")
    collate = Speech.collate

    def collate_exactly(self: Speech, positions: list[int], rng: Any = None) -> Batch:
        batch = collate(self, positions, rng)
        if len(self) != TRAIN:
            return Batch(batch.waveform.double(), batch.lengths, batch.ids, batch.texts)
        exact = first_second(work, self, positions)
        assert torch.allclose(batch.waveform.double(), exact, atol=1e-5)
        return Batch(exact, batch.lengths, batch.ids, batch.texts)

    with monkeypatch.context() as patch:
        patch.setattr(Speech, "collate", collate_exactly)
        patch.setattr(stage, "build_model", lambda *_: model)
        stage.train_arm(context, arm, SEED, RunRecord(arm, SEED), "")
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    norms = transcription(
        reference, work, speech, monkeypatch, codebooks=codebooks, icsl=icsl, clip=clip
    )
    if clip is not None:
        assert max(norms) > clip  # so that clipping did something

    save_huggingface(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name, wanted in reference.state_dict().items():
        if name.endswith("k_proj.bias"):  # its true gradient is zero: what moves it is rounding
            continue
        moved = (wanted - before[name]).norm()
        assert moved > 0, name
        assert float((ours[name] - wanted).norm() / moved) < 1e-9, name


def test_numbers_of_the_recipe() -> None:
    """The study's logs: 2641 utterances, 42 updates an epoch, the last by a single utterance."""
    section = load_recipe("as-run").pretrain_arm("icsl_8cb")
    plan, rate = (
        plan_of(section, np.full(2641, 160000), 42),
        learning_rate_of(section, plan_of(section, np.full(2641, 160000), 42)),
    )
    assert plan.updates_per_epoch == 42
    assert [len(plan.update(k)) for k in (41, 42, 43)] == [4, 2, 4]
    assert [len(batch) for batch in plan.update(42)] == [16, 1]
    assert (rate.length, rate.warmup_steps, rate.peak) == (2100, 100, 1e-4)
    assert rate(1) == 0.0
    assert rate(101) == 1e-4
    assert rate(725) == pytest.approx(6.9e-5, abs=1e-6)  # as printed at the end of the log
