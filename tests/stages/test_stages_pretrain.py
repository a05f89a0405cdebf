"""The pretraining stage: what it logs is true, and arms of a seed are paired."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import make_work, rows, tiny_recipe

from reproduce import position
from reproduce.data.batches import Speech
from reproduce.grid.claiming import describe
from reproduce.model.interop import load_pretraining_model
from reproduce.model.masking import drop_lonely, sample_negatives, span_mask
from reproduce.model.pretrainer import PretrainingModel
from reproduce.objective.codes import code_nmi
from reproduce.position import derive_seed, generator
from reproduce.recipe.schema import Pretrain, Recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages import pretrain as pretraining
from reproduce.tasks import pretraining as stage
from reproduce.tasks.context import open_context
from reproduce.tasks.wiring import plan_of
from reproduce.training import distributed

SEED, UPDATES = 1, 4
EVERY = [
    f"pretrain.updates={UPDATES}",
    "pretrain.log_every=1",
    "pretrain.checkpoint_every=100",
    "pretrain.validation.every=2",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("pretrain"), train=13)


@pytest.fixture
def work(prepared: WorkFolder, tmp_path: Path) -> WorkFolder:
    """The same data, no runs."""
    (tmp_path / "data").symlink_to(prepared.data)
    (tmp_path / "size.yaml").symlink_to(prepared.root / "size.yaml")
    return WorkFolder(tmp_path)


def pretrain(recipe: Recipe, work: WorkFolder, *arms: str, seeds: Sequence[int] = (SEED,)) -> None:
    threads = torch.get_num_threads()
    try:
        pretraining.pretrain(recipe, work, distributed.start("cpu"), arms, seeds)
    finally:
        torch.set_num_threads(threads)


def split(work: WorkFolder, arm: str, which: str) -> list[dict[str, float]]:
    found = [row for row in rows(work.run("pretrain", arm, SEED)) if row["split"] == which]
    return [{k: float(v) for k, v in row.items() if v and k != "split"} for row in found]


class Positions:
    """What belongs to each micro-batch, by the rules of the recipe."""

    def __init__(self, recipe: Recipe, work: WorkFolder, section: Pretrain) -> None:
        context = open_context(recipe, work, distributed.start("cpu"), "pretrain")
        self.section = section
        self.train, self.valid = (
            stage.speech_of(context, section, split) for split in ("train", "valid")
        )
        self.plan = plan_of(section, self.train.cropped, SEED)
        self.model = stage.build_model(recipe.model, section, SEED)

    def mask(self, speech: Speech, batch: Sequence[int], *where: Any) -> np.ndarray:
        options, frames = self.section.masking, self.model.encoder.frames
        total = frames(max(speech.lengths(batch)))
        valid = [frames(length) for length in speech.lengths(batch)]
        if self.section.input_length == "padded":
            valid = [total] * len(valid)
        mask = span_mask(
            valid,
            total,
            probability=options.probability,
            length=options.length,
            min_spans=2,
            spans_drawn=options.spans_drawn,
            rng=generator(SEED, *where),
        )
        return drop_lonely(mask)[0]

    def counts(self, update: int) -> list[int]:
        batches = enumerate(self.plan.update(update))
        return [int(self.mask(self.train, b, "mask", update, j).sum()) for j, b in batches]

    def outputs(self, model: PretrainingModel, update: int) -> Iterator[tuple[Any, np.ndarray]]:
        """The model's output for each micro-batch of an update, and its negatives [N, K]."""
        for j, batch in enumerate(self.plan.update(update)):
            mask = self.mask(self.train, batch, "mask", update, j)
            negatives = sample_negatives(mask, 10, generator(SEED, "negatives", update, j))
            audio = self.train.collate(batch, generator(SEED, "crop", update, j))
            noise = torch.Generator().manual_seed(derive_seed(SEED, "gumbel", update, j))
            torch.manual_seed(derive_seed(SEED, "forward", update, j))
            out = model(
                audio.waveform,
                audio.lengths,
                torch.from_numpy(mask),
                torch.from_numpy(negatives),
                gumbel_temperature=2.0,
                generator=noise,
            )
            yield out, negatives


def slow_similarity(codebooks: torch.Tensor, form: str) -> torch.Tensor:
    """Mean over pairs of the mean cosine, or squared cosine."""
    power = 2 if form == "squared" else 1
    found = [
        (torch.cosine_similarity(a[:, None], b[None], dim=-1) ** power).mean()
        for i, a in enumerate(codebooks)
        for b in codebooks[i + 1 :]
    ]
    return torch.stack(found).mean()


@pytest.mark.parametrize(
    ("protocol", "arm", "inside", "outside"),
    [("as-run", "icsl_8cb", 0.1, 0.0), ("as-run", "icsl_2cb", 0.0, 100.0)],
)
def test_effective_weight_as_run(
    work: WorkFolder, protocol: str, arm: str, inside: float, outside: float
) -> None:
    """Against two gradients that go through what was done to the real one: a unit of ICSL, and of
    the mean loss a frame."""
    recipe = tiny_recipe(protocol, work, *EVERY)
    pretrain(recipe, work, arm)
    about = Positions(recipe, work, recipe.pretrain_arm(arm))
    for update, row in enumerate(split(work, arm, "train"), 1):
        similarity = frames = 0.0
        counts = about.counts(update)
        for count in counts:
            similarity = (similarity + inside / 4 + outside) / count
            frames = (frames + count / 4) / count
        assert row["icsl_effective_weight"] == pytest.approx(similarity / frames, rel=1e-6)
        nearly = (0.1 if inside else 400.0) / counts[-1]
        assert row["icsl_effective_weight"] == pytest.approx(nearly, rel=0.05)


@pytest.mark.parametrize(
    ("protocol", "arm", "form"),
    [
        ("corrected", "icsl_8cb", "signed"),
        ("corrected", "icsl_sq_8cb", "squared"),
        ("corrected", "no_icsl_2cb", "signed"),
        ("as-run", "icsl_8cb", "signed"),
        ("as-run", "icsl_2cb", "signed"),
    ],
)
def test_first_update_as_logged(work: WorkFolder, protocol: str, arm: str, form: str) -> None:
    """Everything in the row of update 1, from the initial model and a slow computation."""
    sets = ["pretrain.updates=2", "pretrain.schedule.length=1.0", "pretrain.schedule.warmup=0.5"]
    recipe = tiny_recipe(protocol, work, *EVERY, *sets)
    pretrain(recipe, work, arm)
    row, _ = split(work, arm, "train")
    section = recipe.pretrain_arm(arm)
    about = Positions(recipe, work, section)
    model = about.model.train()
    outputs = list(about.outputs(model, 1))

    count = sum(out.masked_frames for out, _ in outputs)
    assert count == sum(about.counts(1))
    assert row["contrastive_loss"] == pytest.approx(
        sum(float(out.contrastive_loss.detach()) for out, _ in outputs) / count, rel=1e-6
    )
    kept = []
    for j, (out, negatives) in enumerate(outputs):
        batch = about.plan.update(1)[j]
        where = np.argwhere(about.mask(about.train, batch, "mask", 1, j))
        codes = {tuple(place): tuple(code) for place, code in zip(where, out.codes.tolist())}
        for (utterance, frame), drawn in zip(where, negatives, strict=True):
            own = codes[utterance, frame]
            kept.append(sum(codes[utterance, other] != own for other in drawn))
    assert len(kept) == count
    assert row["negatives_kept"] == pytest.approx(np.mean(kept))
    assert row["chance_loss"] == pytest.approx(np.mean(np.log1p(kept)), rel=1e-6)

    frames = about.model.encoder.frames
    possible = sum(
        frames(max(about.train.lengths(b))) * len(b)
        if section.input_length == "padded"
        else sum(map(frames, about.train.lengths(b)))
        for b in about.plan.update(1)
    )
    assert row["mask_fraction"] == pytest.approx(count / possible)
    books = model.quantizer.codebooks()
    similarity = slow_similarity(books, form)
    assert row["icsl"] == pytest.approx(float(similarity.detach()), rel=1e-5)
    assert row["gumbel_temperature"] == 2.0
    assert row["learning_rate"] == 0.0
    assert row["audio_seconds"] == pytest.approx(
        sum(sum(about.train.lengths(b)) for b in about.plan.update(1)) / 16_000
    )

    # the gradient, part by part
    (parameter,) = model.codebook_parameters()
    own = torch.zeros_like(parameter)
    (unit,) = torch.autograd.grad(similarity, parameter)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for out, _ in outputs:
        loss = out.contrastive_loss + 0.1 * out.diversity_loss
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        shared = 4.0 if protocol == "as-run" else 1.0
        weight = section.icsl.weight * (out.masked_frames if protocol == "corrected" else 1.0)
        if not section.icsl.divided_by_accumulation:
            weight *= shared
        for place, part in enumerate(parts):
            total[place] += (torch.zeros_like(total[place]) if part is None else part) / shared
        own += weight * unit / shared
        if protocol == "as-run":
            for gradient in (own, *total):
                gradient /= out.masked_frames
    index = next(i for i, p in enumerate(model.parameters()) if p is parameter)
    if protocol == "corrected":
        for gradient in (own, *total):
            gradient /= count
    rest = total[index].clone()
    share = float(own.norm() / (own.norm() + rest.norm()))
    assert row["icsl_gradient_share"] == pytest.approx(share, rel=1e-3, abs=1e-9)
    assert (share > 0) == (section.icsl.weight > 0)
    total[index] += own
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in total))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_validation_before_the_first_update(work: WorkFolder) -> None:
    """A row more, and nothing else changes."""
    pretrain(tiny_recipe("as-run", work, *EVERY), work, "icsl_2cb")
    before = split(work, "icsl_2cb", "valid")
    again = WorkFolder(work.root / "again")
    shutil.copytree(work.data, again.data)
    sets = (*EVERY, "pretrain.validation.initial=true")
    pretrain(tiny_recipe("as-run", work, *sets), again, "icsl_2cb")
    first, *rest = split(again, "icsl_2cb", "valid")
    assert first["update"] == 0
    assert first["contrastive_loss"] > 0
    for row in (*before, *rest):
        row.pop("wall_seconds")
    assert rest == before


@pytest.mark.parametrize("protocol", ["corrected", "as-run"])
def test_last_validation_is_that_of_the_saved_model(work: WorkFolder, protocol: str) -> None:
    recipe = tiny_recipe(protocol, work, *EVERY)
    pretrain(recipe, work, "icsl_4cb")
    section = recipe.pretrain_arm("icsl_4cb")
    about = Positions(recipe, work, section)
    run = work.run("pretrain", "icsl_4cb", SEED)
    model = load_pretraining_model(run.model)
    redrawn = [UPDATES] if section.validation.redraw else []  # else the same masks each time
    loss = chance = kept = count = 0.0
    speech = [0.0, 0.0, 0.0]
    codes = []
    for index, batch in enumerate([[0, 1, 2], [3, 4]]):
        mask = about.mask(about.valid, batch, "valid mask", index, *redrawn)
        negatives = sample_negatives(mask, 10, generator(SEED, "valid negatives", index, *redrawn))
        audio = about.valid.collate(batch)
        with torch.no_grad():
            out = model(
                audio.waveform, audio.lengths, torch.from_numpy(mask), torch.from_numpy(negatives)
            )
        loss += float(out.contrastive_loss)
        chance += float(out.chance_loss)
        kept += float(out.negatives_kept)
        count += out.masked_frames
        codes.append(out.codes.numpy())
        # the tests' speech is never silent
        drawn = sample_negatives(mask, 10, generator(SEED, "valid speech negatives", index))
        with torch.no_grad():
            out = model(
                audio.waveform, audio.lengths, torch.from_numpy(mask), torch.from_numpy(drawn)
            )
        for place, value in enumerate((out.contrastive_loss, out.chance_loss, out.masked_frames)):
            speech[place] += float(value)
    row = split(work, "icsl_4cb", "valid")[-1]
    assert row["contrastive_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert row["chance_loss"] == pytest.approx(chance / count, rel=1e-5)
    assert row["negatives_kept"] == pytest.approx(kept / count)
    if protocol == "corrected":  # as-run masks padding too, which is no speech
        assert row["speech_loss"] == pytest.approx(speech[0] / speech[2], rel=1e-5)
        assert row["speech_chance"] == pytest.approx(speech[1] / speech[2], rel=1e-5)
    together = np.concatenate(codes)
    assert row["code_nmi"] == pytest.approx(code_nmi(together, 8))
    perplexity = 0.0
    for column in together.T:
        shares = np.array(list(Counter(column.tolist()).values())) / len(column)
        perplexity += math.exp(-(shares * np.log(shares)).sum())
    assert row["perplexity"] == pytest.approx(perplexity)
    books = model.quantizer.codebooks().detach()
    assert row["icsl"] == pytest.approx(float(slow_similarity(books, "signed")), rel=1e-5)
    with np.load(run.codes) as saved:
        assert np.array_equal(saved["codebooks_last"], books.numpy())
        initial = about.model.quantizer.codebooks().detach().numpy()
        assert np.array_equal(saved["codebooks_first"], initial)
        assert saved["code_counts"].sum() == 4 * len(together)
        below = np.triu_indices(4, 1)
        difference = (saved["nmi"] - saved["nmi_baseline"])[below].mean()
        assert row["code_nmi"] == pytest.approx(difference)


# ----------------------------------------------------------------------------- paired arms


class Recorded:
    """What each forward pass of training was given, and the next draw of the global stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[np.ndarray]] = []
        forward = PretrainingModel.forward

        def recording(model: PretrainingModel, *arguments: Any, **options: Any) -> Any:
            out = forward(model, *arguments, **options)
            if model.training:
                given = [argument.numpy().copy() for argument in arguments]
                self.calls.append([*given, torch.rand(3).numpy()])
            return out

        monkeypatch.setattr(PretrainingModel, "forward", recording)


def test_arms_of_a_seed_are_paired(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same crops, masks, negatives, and dropout and layer drop, for any number of codebooks."""
    recorded = Recorded(monkeypatch)
    sets = [*EVERY, "pretrain.crop=random", "model.layer_drop=0.3"]
    recipe = tiny_recipe("corrected", work, *sets)
    arms = ["no_icsl_2cb", "icsl_2cb", "icsl_8cb"]
    pretrain(recipe, work, *arms)
    per_arm = UPDATES * 4
    assert len(recorded.calls) == per_arm * len(arms)
    first = recorded.calls[:per_arm]
    for start in range(per_arm, len(recorded.calls), per_arm):
        for ours, theirs in zip(recorded.calls[start : start + per_arm], first, strict=True):
            assert all(map(np.array_equal, ours, theirs))
    recorded.calls.clear()
    pretrain(tiny_recipe("corrected", work, *sets, "seeds=[2]"), work, "icsl_2cb", seeds=[2])
    for ours, theirs in zip(recorded.calls, first, strict=True):
        assert not np.array_equal(ours[-1], theirs[-1])  # another seed, another stream
    draws = {tuple(call[-1].tolist()) for call in first}
    assert len(draws) == per_arm


def test_initial_weights_are_shared_where_shapes_agree(work: WorkFolder) -> None:
    recipe = tiny_recipe("corrected", work)
    models = [
        stage.build_model(recipe.model, recipe.pretrain_arm(arm), SEED)
        for arm in ("no_icsl_2cb", "icsl_2cb", "icsl_16cb")
    ]
    first, second, wide = (dict(m.named_parameters()) for m in models)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        if not name.startswith("quantizer."):
            assert torch.equal(weight, wide[name]), name


def test_no_two_positions_share_a_seed() -> None:
    """Over streams, updates and micro-batches of all seeds of a grid."""
    streams = (
        "mask", "negatives", "gumbel", "forward", "crop", "channel mask", "valid mask",
        "valid negatives",
    )  # fmt: skip
    seen = set()
    places = 0
    for seed in (1, 2, 3, 4, 5, 42):
        for single in ("init", "validation"):
            seen.add(derive_seed(seed, single))
            places += 1
        for stream in streams:
            for update in range(1, 251):
                for index in range(4):
                    seen.add(derive_seed(seed, stream, update, index))
                    places += 1
        for epoch in range(60):
            seen.add(derive_seed(seed, "shuffle", epoch))
            places += 1
    assert len(seen) == places
    assert max(seen) < 2**63
    assert derive_seed(1, "mask", 1, 11) != derive_seed(1, "mask", 11, 1)
    assert derive_seed(1, "mask", 12, 3) != derive_seed(1, "mask", 1, 23)


def test_torch_gets_seeds_that_differ_in_the_bits_it_takes() -> None:
    """The low 32 on a CPU: dropout and Gumbel noise of all 2200 updates of a seed differ."""
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5 + 2**32)
    assert torch.equal(torch.rand(3), first)
    for seed in (1, 2, 3, 4, 5, 42):
        seen = [
            derive_seed(seed, stream, update, index) % 2**32
            for stream in ("forward", "gumbel")
            for update in range(1, 2201)
            for index in range(4)
        ]
        assert len(set(seen)) == len(seen)


def test_a_run_asks_for_each_position_once(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream is read at the same position for two purposes."""
    asked: Counter[str] = Counter()
    blake2b = position.hashlib.blake2b

    class Hashes:
        @staticmethod
        def blake2b(key: bytes, digest_size: int) -> Any:
            asked[key.decode()] += 1
            return blake2b(key, digest_size=digest_size)

    monkeypatch.setattr(position, "hashlib", Hashes)
    pretrain(tiny_recipe("corrected", work, *EVERY), work, "icsl_2cb")
    training = [k for k in asked if k.split("/")[1] in ("mask", "negatives", "gumbel", "forward")]
    assert len(training) == 4 * 4 * UPDATES
    assert {asked[key] for key in training} == {1}
    twice = {key for key, count in asked.items() if count > 1}
    assert {key.split("/")[1] for key in twice} <= {
        *("valid mask", "valid negatives", "valid speech negatives"),
        *("shuffle", "buckets"),
    }


# ------------------------------------------------------------------------------- how it ended


def test_a_run_at_chance_says_so(work: WorkFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """As run, after four updates: nothing learned, the loss within 0.02 of its chance level."""
    sets = ["pretrain.quantizer.entries=320", "pretrain.optimizer.learning_rate=1e-6"]
    recipe = tiny_recipe("as-run", work, *EVERY, *sets, "pretrain.contrastive.temperature=10.0")
    pretrain(recipe, work, "no_icsl_2cb")
    record = RunRecord.read(work.run("pretrain", "no_icsl_2cb", SEED).record)
    valid = split(work, "no_icsl_2cb", "valid")[-1]
    assert abs(valid["contrastive_loss"] - valid["chance_loss"]) <= 0.02
    assert (record.status, record.outcome) == ("finished", "at_chance")
    assert "finished, at_chance, loss" in capsys.readouterr().err
    assert record.final["valid"]["chance_loss"] == pytest.approx(valid["chance_loss"])


@pytest.mark.parametrize(
    ("loss", "chance", "perplexity", "expected"),
    [
        (4.0, 4.61, 40.0, "ok"),
        (4.6, 4.61, 40.0, "at_chance"),
        (4.63, 4.61, 40.0, "at_chance"),
        (4.631, 4.61, 40.0, "ok"),  # worse than chance is not at chance
        (4.0, 4.61, 15.9, "collapsed"),  # under two codes a codebook of 8
        (0.0, 0.0, 8.0, "collapsed"),  # all negatives removed
        (math.nan, 4.61, 40.0, "diverged"),
        (math.inf, 4.61, 8.0, "diverged"),
    ],
)
def test_outcomes(loss: float, chance: float, perplexity: float, expected: str) -> None:
    valid = {
        "contrastive_loss": loss,
        "chance_loss": chance,
        "perplexity": perplexity,
        "mask_fraction": 0.5,
    }
    assert stage.outcome_of(valid, 8) == expected
    record = RunRecord("arm", 1, outcome=stage.outcome_of(valid, 8))
    assert (expected in describe(record)) == (expected != "ok")
