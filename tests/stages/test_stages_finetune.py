"""Fine-tuning through the stage: the bank, kept features, what is trained, encoders, outcomes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import (
    Noise,
    assert_rows_close,
    command,
    command_without_dropout,
    finish,
    make_work,
    rows,
    spec,
    start,
    start_ranks,
    tiny_recipe,
    train,
    weights,
)

from reproduce.compat import import_torchaudio
from reproduce.data import features as feature_files
from reproduce.data.corpora import Utterance
from reproduce.data.manifest import Manifest, write_manifest
from reproduce.errors import DataError, DivergedError, InterruptedRun, RecipeError, UsageError
from reproduce.grid import claiming
from reproduce.grid.lock import RunLock
from reproduce.model import load_recognizer
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.folders import save_folder
from reproduce.model.interop import encoder_state_to_huggingface, load_encoder
from reproduce.records import RunFolder, RunRecord, WorkFolder
from reproduce.stages.finetune import finetune
from reproduce.stages.pretrain import pretrain
from reproduce.tasks import features as kept_features
from reproduce.tasks import recognition
from reproduce.tasks.recognition import FinetuneTask
from reproduce.tasks.wiring import learning_rate_of, plan_of
from reproduce.training.checkpoint import load_checkpoint
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Terms

ONE = Ranks(0, 1, torch.device("cpu"))
ARMS = ["no_rvq", "rvq_1", "rvq_4", "rvq_2"]
SHORT = ["finetune.updates=3"]


def save_encoder(folder: Path, extractor: str = "group_norm", seed: int = 0) -> Path:
    """A Hugging Face folder of random weights."""
    config = EncoderConfig(
        extractor=extractor,  # type: ignore[arg-type]
        conv_channels=(16,) * 7,
        width=32,
        layers=2,
        heads=2,
        feed_forward=48,
        position_kernel=8,
        position_groups=2,
    )
    torch.manual_seed(seed)
    encoder = Encoder(config)
    save_folder(folder, config.to_huggingface(), encoder_state_to_huggingface(encoder))
    return folder


def as_recorded(work: WorkFolder, encoder: str) -> None:
    """Have an encoder say that its input isn't to be normalized."""
    path = work.root / encoder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """Prepared data and two encoders, `encoder` (group norm) and `layer_norm`."""
    work = make_work(tmp_path_factory.mktemp("finetune"))
    save_encoder(work.root / "encoder")
    save_encoder(work.root / "layer_norm", "layer_norm")
    return work


@pytest.fixture
def fresh(base: WorkFolder, tmp_path: Path) -> Callable[[], WorkFolder]:
    """Makes work folders with the same data and encoders and no runs."""
    made: list[Path] = []

    def make() -> WorkFolder:
        folder = tmp_path / f"work-{len(made)}"
        shutil.copytree(base.root, folder)
        made.append(folder)
        return WorkFolder(folder)

    return make


def run(
    protocol: str,
    work: WorkFolder,
    arms: Sequence[str],
    *sets: str,
    encoder: str = "encoder",
    seeds: Sequence[int] = (1,),
) -> list[RunFolder]:
    """The arms of these seeds, six updates unless told otherwise."""
    options = [f"seeds={list(seeds)}", f"finetune.encoder={work.root / encoder}"]
    recipe = tiny_recipe(protocol, work, *options, "finetune.updates=6", *sets)
    finetune(recipe, work, ONE, arms, seeds)
    return [work.run("finetune", arm, seed) for seed in seeds for arm in arms]


def assert_close(found: RunFolder, expected: RunFolder, tolerance: float = 1e-5) -> None:
    """The same metrics and weights, to within the order of floating-point sums."""
    assert_rows_close(rows(found), rows(expected), tolerance)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=tolerance, atol=tolerance, msg=name)


def assert_equal(found: RunFolder, expected: RunFolder) -> None:
    """To the last bit."""
    assert rows(found, "wall_seconds") == rows(expected, "wall_seconds")
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert found.hypotheses.read_bytes() == expected.hypotheses.read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM in the middle of an update."""
    begin = FinetuneTask.begin_update

    def begin_and_signal(self: FinetuneTask, update: int, *more: Any) -> None:
        if update == at:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, update, *more)

    monkeypatch.setattr(FinetuneTask, "begin_update", begin_and_signal)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Utterances of each pass of the encoder from now on."""
    batches: list[int] = []
    forward = Encoder.forward

    def counting(self: Encoder, waveform: torch.Tensor, *rest: Any, **named: Any) -> Any:
        batches.append(len(waveform))
        return forward(self, waveform, *rest, **named)

    monkeypatch.setattr(Encoder, "forward", counting)
    return batches


# -------------------------------------------------------------------------------------- the input


def test_an_encoder_that_wants_its_input_as_recorded(fresh: Callable[[], WorkFolder]) -> None:
    """Kept features, training and the finished model follow ``do_normalize``."""
    work = fresh()
    as_recorded(work, "layer_norm")
    sets = [*SHORT, "data.vocabulary=corpus"]
    (run_of,) = run("as-written", work, ["rvq_1"], *sets, encoder="layer_norm")
    trained = load_recognizer(run_of.model)
    assert not trained.encoder.config.normalized
    manifest = Manifest.read(work.data)
    valid = manifest.select(split="valid")
    pcm = manifest.audio.slice(valid.at("offset", 0), valid.at("samples", 0))
    with run_of.hypotheses.open(encoding="utf-8") as file:
        written = {line["id"]: line["hypothesis"] for line in csv.DictReader(file)}
    assert trained.transcribe(pcm) == written[valid.at("id", 0)]
    record = RunRecord.read(run_of.record)
    assert record.settings["encoder_input"] == "as it is"

    (other,) = run("as-written", fresh(), ["rvq_1"], *sets, encoder="layer_norm")
    losses = [rows(folder)[0]["ctc_loss"] for folder in (run_of, other)]
    assert losses[0] != losses[1]


# -------------------------------------------------------------------------------------- the bank


@pytest.mark.parametrize(
    ("protocol", "sets"),
    [
        ("as-run", []),  # train mode, codebooks move every micro-batch
        ("as-written", ["finetune.keep_features=no", "finetune.head_dropout=0.2"]),
        ("as-written", ["finetune.rvq.kmeans_init=true", "finetune.rvq.revive_below=1.0"]),
    ],
    ids=["as-run", "encoded each time", "kept, k-means and revival"],
)
def test_an_arm_in_the_bank_is_the_arm_alone(
    fresh: Callable[[], WorkFolder], protocol: str, sets: list[str]
) -> None:
    clip = "finetune.optimizer.clip_norm=0.5"
    together, alone = fresh(), fresh()
    bank = run(protocol, together, ARMS, *sets, clip)
    assert all(float(row["grad_norm"]) > 0.5 for row in rows(bank[0]) if row["split"] == "train")
    for arm, folder in zip(ARMS, bank, strict=True):
        assert_close(run(protocol, alone, [arm], *sets, clip)[0], folder)
    heads = [weights(folder)["lm_head.weight"] for folder in bank]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])


def test_one_pass_of_the_encoder_feeds_the_bank(
    fresh: Callable[[], WorkFolder], encoded: list[int]
) -> None:
    run("as-run", fresh(), ARMS, *SHORT)
    assert (
        sum(encoded) == 21 + 5
    )  # an epoch in three updates of 4, 4 and 3 micro-batches; validation


def poison(monkeypatch: pytest.MonkeyPatch, arm: str, at: int) -> None:
    """From an update on an arm's loss isn't finite."""
    forward = FinetuneTask.forward

    def poisoned(self: FinetuneTask, update: int, index: int, batch: Any) -> dict[str, Terms]:
        terms = forward(self, update, index, batch)
        name = f"finetune/{arm}/seed-1"
        if update >= at and name in terms:
            terms[name].loss = terms[name].loss * float("nan")
        return terms

    monkeypatch.setattr(FinetuneTask, "forward", poisoned)


@pytest.mark.parametrize("protocol", ["as-run", "as-written"])
def test_a_diverged_arm_drops_out_alone(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    undisturbed, disturbed = fresh(), fresh()
    expected = run(protocol, undisturbed, ARMS)
    with monkeypatch.context() as patch:
        poison(patch, "rvq_4", at=3)
        interrupt(patch, at=5)
        with pytest.raises(InterruptedRun):
            run(protocol, disturbed, ARMS)
    records = [RunRecord.read(disturbed.run("finetune", arm, 1).record) for arm in ARMS]
    assert [record.status for record in records] == [
        "interrupted", "interrupted", "failed", "interrupted"
    ]  # fmt: skip
    assert records[2].outcome == "diverged"
    assert "update 3" in records[2].reason
    assert "u0" in records[2].reason  # names the utterances

    with pytest.raises(DivergedError, match="finetune/rvq_4/seed-1"):
        run(protocol, disturbed, ARMS)
    for found in expected:
        if found.arm != "rvq_4":
            assert_close(disturbed.run("finetune", found.arm, 1), found)
    assert RunRecord.read(disturbed.run("finetune", "rvq_4", 1).record).outcome == "diverged"


def test_arms_killed_between_their_checkpoints_go_on_together(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint that all have; an arm without any begins anew, by itself."""
    whole, broken = fresh(), fresh()
    expected = run("as-written", whole, ARMS)
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        with pytest.raises(InterruptedRun):
            run("as-written", broken, ARMS)
    shutil.rmtree(broken.run("finetune", "rvq_1", 1).checkpoints / "update-4")
    shutil.rmtree(broken.run("finetune", "rvq_2", 1).checkpoints)
    for found, wanted in zip(run("as-written", broken, ARMS), expected, strict=True):
        assert_close(found, wanted)


# --------------------------------------------------------------------------------- kept features


@pytest.mark.parametrize("encoder", ["encoder", "layer_norm"])
def test_kept_features_train_the_same_arms(fresh: Callable[[], WorkFolder], encoder: str) -> None:
    found = {
        keep: run("as-written", fresh(), ARMS, f"finetune.keep_features={keep}", encoder=encoder)
        for keep in ("no", "float32", "float16")
    }
    for place in range(len(ARMS)):
        each_time, kept, half = (found[keep][place] for keep in ("no", "float32", "float16"))
        assert_close(kept, each_time)  # each time in batches
        for ours, theirs in zip(rows(half), rows(kept), strict=True):
            assert float(ours["ctc_loss"]) == pytest.approx(float(theirs["ctc_loss"]), rel=0.01)


@pytest.mark.parametrize("encoder", ["encoder", "layer_norm"])
def test_features_encoded_in_batches_are_those_of_single_utterances(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    """As on a GPU: to rounding, each in its place."""
    found = []
    for together in (1, 8):
        monkeypatch.setitem(kept_features.TOGETHER, "cpu", together)
        work = fresh()
        run("as-written", work, ["no_rvq"], *SHORT, encoder=encoder)
        files = sorted(work.features.glob("[!.]*"), key=lambda file: file.stat().st_size)
        found.append([np.fromfile(file, np.float32) for file in files])
    for alone, batched in zip(*found, strict=True):
        np.testing.assert_allclose(batched, alone, rtol=0, atol=4e-6)  # of values up to 4


@pytest.mark.parametrize("protocol", ["as-written", "corrected"])
def test_validation_in_batches_is_that_of_single_utterances(
    fresh: Callable[[], WorkFolder], protocol: str, encoded: list[int]
) -> None:
    """An encoder with group norm, which padding would change."""
    found = []
    for size in (1, 4):
        encoded.clear()
        sets = [*SHORT, f"finetune.validation.batch_size={size}", "finetune.keep_features=no"]
        found += run(protocol, fresh(), ["rvq_2"], *sets)
        assert encoded[-math.ceil(5 / size) :] == ([1] * 5 if size == 1 else [4, 1])
    singles, batches = (
        [r for r in rows(run, "wall_seconds") if r["split"] == "valid"] for run in found
    )
    assert_rows_close(batches, singles, 1e-6)
    texts = [run.hypotheses.read_text(encoding="utf-8") for run in found]
    assert texts[0] == texts[1]


def test_features_are_computed_once_for_all_arms_and_seeds(
    fresh: Callable[[], WorkFolder], encoded: list[int]
) -> None:
    work = fresh()
    run("as-written", work, ["no_rvq", "rvq_2"], *SHORT, seeds=[1, 2])
    assert encoded == [1] * (21 + 5)
    run("as-written", work, ["rvq_1"], *SHORT, seeds=[1, 2])
    assert len(encoded) == 26
    files = sorted(work.features.glob("[!.]*"), key=lambda file: file.stat().st_size)
    assert len(files) == 2

    # what they hold: each utterance by itself, one behind the other, in manifest order
    model, manifest = load_encoder(work.root / "encoder"), Manifest.read(work.data)
    for file, split in zip(files, ("valid", "train"), strict=True):
        speech = recognition.Speech(manifest.select(split=split), manifest.audio)
        alone = [model(speech.collate([i]).waveform).features[0] for i in range(len(speech))]
        kept = np.fromfile(file, np.float32).reshape(-1, 32)
        np.testing.assert_array_equal(kept, torch.cat(alone).detach().numpy())

    half = [*SHORT, "finetune.keep_features=float16"]
    run("as-written", work, ["rvq_4"], *half)
    other = save_encoder(work.root / "other", seed=1)
    run("as-written", work, ["rvq_8"], *SHORT, encoder=other.name)
    longer = [*SHORT, "finetune.min_seconds=1.0"]
    run("as-written", work, ["rvq_16"], *longer)
    sizes = sorted(file.stat().st_size for file in work.features.glob("[!.]*"))
    assert len(sizes) == 8
    assert sizes.count(files[1].stat().st_size) == 2  # of the other encoder
    assert sizes.count(files[1].stat().st_size // 2) == 1


def test_the_time_of_encoding_is_in_the_run_that_did_it(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = fresh()
    forward = Encoder.forward

    def slow(self: Encoder, *args: Any, **named: Any) -> Any:
        time.sleep(0.02)
        return forward(self, *args, **named)

    monkeypatch.setattr(Encoder, "forward", slow)
    first, second = run("as-written", work, ["no_rvq"], *SHORT, seeds=[1, 2])
    encoding = 26 * 0.02
    for folder, least, most in ((first, encoding, 60.0), (second, 0.0, encoding)):
        assert least <= float(rows(folder)[0]["wall_seconds"]) < most
        assert least <= RunRecord.read(folder.record).wall_seconds < most


def test_a_record_names_the_arms_trained_together(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = fresh()
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises(InterruptedRun):
            run("as-written", work, ["no_rvq", "rvq_2"], *SHORT)
    bank, alone = ["no_rvq", "rvq_2"], "rvq_4"  # which comes later, and has no checkpoint
    for folder in run("as-written", work, [*bank, alone], *SHORT):
        assert RunRecord.read(folder.record).bank == ([] if folder.arm == alone else bank)
    (single,) = run("corrected", fresh(), ["rvq_2"], *SHORT)
    assert RunRecord.read(single.record).bank == []


def test_features_are_kept_only_where_they_are_the_same_each_time(
    fresh: Callable[[], WorkFolder],
) -> None:
    padding = ["finetune.input_length=padded", "finetune.rvq.padding=true"]
    for protocol, sets in (
        ("as-run", []),
        ("corrected", []),
        ("as-written", padding),
        ("as-written", ["finetune.rvq.padding=true"]),
    ):
        work = fresh()
        run(protocol, work, ["rvq_1"], *SHORT, *sets)
        assert not work.features.exists()


def test_features_are_whole_or_absent(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, whole = fresh(), fresh()
    (expected,) = run("as-written", whole, ["no_rvq"], *SHORT)
    write = feature_files.FeatureFile.write

    def stop_in_the_middle(self: Any, position: int, features: torch.Tensor) -> None:
        if position == 11:
            raise KeyboardInterrupt
        write(self, position, features)

    with monkeypatch.context() as patch:
        patch.setattr(feature_files.FeatureFile, "write", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            run("as-written", work, ["no_rvq"], *SHORT)
    assert not list(work.features.glob("[!.]*"))
    (found,) = run("as-written", work, ["no_rvq"], *SHORT)
    assert_equal(found, expected)
    assert not list(work.features.glob("*.partial"))

    for file in work.features.glob("[!.]*"):  # cut short by someone else
        os.truncate(file, 100)
    (again,) = run("as-written", work, ["rvq_1"], *SHORT)
    assert RunRecord.read(again.record).status == "finished"


def test_no_room_for_the_features(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="keep_features=float16") as raised:
        run("as-written", fresh(), ["no_rvq"])
    assert raised.value.exit_code == 3


def test_processes_and_ranks_share_the_features(
    base: WorkFolder, fresh: Callable[[], WorkFolder]
) -> None:
    """Two processes at once, each with a seed; then two ranks of one run."""
    work, ranked = fresh(), fresh()
    options = ["--set", f"finetune.encoder={base.root / 'encoder'}", "--arm", "no_rvq"]
    options += ["--set", "seeds=[1, 2]", "--set", "finetune.updates=2"]

    def arguments(folder: WorkFolder, *more: str) -> list[str]:
        return ["finetune", spec("as-written", base), "--work", str(folder.root), *options, *more]

    log = work.root / "process.log"
    both = [start(command, arguments(work, "--seed", seed), log=log) for seed in ("1", "2")]
    finish(both, log)
    assert log.read_text().count("features kept") == 2  # train and valid, by one of the two

    log = ranked.root / "ranks.log"
    finish(start_ranks(2, command, arguments(ranked, "--seed", "1"), log=log), log)
    for file in work.features.glob("[!.]*"):
        assert (ranked.features / file.name).read_bytes() == file.read_bytes()
    assert_close(ranked.run("finetune", "no_rvq", 1), work.run("finetune", "no_rvq", 1))


# ------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("part", ["head", "transformer", "all"])
def test_exactly_the_named_parameters_are_trained(
    fresh: Callable[[], WorkFolder], part: str
) -> None:
    work = fresh()
    sets = [*SHORT, f"finetune.train={part}", "finetune.transformer_from=0.0"]
    if part == "head":
        sets += ["finetune.rvq.commitment=0.0", "finetune.encoder_mode=train"]
    (found,) = run("corrected", work, ["rvq_2"], *sets)
    before = encoder_state_to_huggingface(load_encoder(work.root / "encoder"))
    after = weights(found)
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    extractor = {name for name in before if ".feature_extractor." in name}
    assert extractor
    assert (
        changed
        == {
            "head": set(),
            "transformer": before.keys() - extractor,
            "all": before.keys(),
        }[part]
    )


@pytest.mark.parametrize("part", ["transformer", "all"])
def test_the_encoder_waits_for_its_update(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Stopped at the last update before it is trained; going on meets the uninterrupted run."""
    work, whole = fresh(), fresh()
    sets = [f"finetune.train={part}", "finetune.transformer_from=0.5"]
    modes: list[tuple[str, bool, bool, bool]] = []
    forward = FinetuneTask.forward

    def spy(self: FinetuneTask, update: int, index: int, batch: Any) -> dict[str, Terms]:
        encoder = self.recognizer.encoder
        masked = self._masks(update, index, batch)[0] is not None
        needed = any(parameter.requires_grad for parameter in encoder.parameters())
        modes.append((self.recognizer.encoder_mode, encoder.training, masked, needed))
        return forward(self, update, index, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "forward", spy)
        (expected,) = run("corrected", whole, ["rvq_1"], *sets)
    waiting, trained = ("frozen_train", True, True, False), ("trained", True, True, True)
    assert modes == [waiting] * 3 * 4 + [trained] * 3 * 4  # dropout and masks throughout
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(InterruptedRun):
            run("corrected", work, ["rvq_1"], *sets)
    stopped = work.run("finetune", "rvq_1", 1)
    task = load_checkpoint(stopped.checkpoints, 3)["task"]
    before = load_encoder(work.root / "encoder").state_dict()
    assert all(torch.equal(task["encoder"][name], weight) for name, weight in before.items())
    (found,) = run("corrected", work, ["rvq_1"], *sets)
    assert_equal(found, expected)
    after = load_encoder(found.model).state_dict()
    assert not torch.equal(after["mask_embedding"], before["mask_embedding"])
    assert not torch.equal(
        after["transformer.layers.0.attention.q_proj.weight"],
        before["transformer.layers.0.attention.q_proj.weight"],
    )


def test_how_an_update_is_cut_changes_nothing(base: WorkFolder, tmp_path: Path) -> None:
    """One micro-batch of eight or four of two, of unequal lengths: one loss, commitment included.

    In float64, where rounding turns no choice of a code. Without what is drawn by micro-batch:
    dropout, masks and the frames that dead codes become.
    """
    sets = [f"finetune.encoder={base.root / 'layer_norm'}", "finetune.transformer_from=0.0"]
    sets += ["finetune.masking.probability=0", "finetune.masking.min_spans=0"]
    sets += ["finetune.masking.channel_probability=0", "finetune.rvq.revive_below=null"]
    sets += ["finetune.rvq.commitment=5.0", "finetune.updates=6", "finetune.batches=shuffled"]
    options = ["--arm", "no_rvq", "--arm", "rvq_2"]
    found = []
    for size, number in ((8, 1), (2, 4)):
        work = WorkFolder(tmp_path / f"{size}x{number}")
        shutil.copytree(base.root, work.root)
        cut = [f"finetune.batch_size={size}", f"finetune.accumulation={number}"]
        words = [word for text in [*sets, *cut] for word in ("--set", text)]
        train("finetune", "corrected", work, *options, *words, target=command_without_dropout)
        found.append([work.run("finetune", arm, 1) for arm in ("no_rvq", "rvq_2")])
    for whole, parts in zip(*found, strict=True):
        assert_close(parts, whole, 1e-8)


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("encoder", ["encoder", "layer_norm"])
@pytest.mark.parametrize("protocol", ["as-written", "corrected"])
def test_evaluation_does_not_depend_on_the_batch(
    fresh: Callable[[], WorkFolder], protocol: str, encoder: str
) -> None:
    found = []
    for size in (1, 5):
        sets = [*SHORT, f"finetune.validation.batch_size={size}", "finetune.keep_features=no"]
        found += run(protocol, fresh(), ["rvq_2"], *sets, encoder=encoder)
    single, batched = found
    assert_close(batched, single)
    assert batched.hypotheses.read_bytes() == single.hypotheses.read_bytes()


def capture_lengths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """(frames of the batch, input lengths) of each CTC loss from now on."""
    seen: list[tuple[int, list[int]]] = []
    loss = recognition.ctc_loss

    def spy(logits: torch.Tensor, targets: Any, lengths: torch.Tensor, *rest: Any) -> Any:
        seen.append((logits.shape[-2], lengths.tolist()))
        return loss(logits, targets, lengths, *rest)

    monkeypatch.setattr(recognition, "ctc_loss", spy)
    return seen


def test_input_lengths(fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """As run, CTC sees every frame of the batch, in training and validation alike."""
    seen = capture_lengths(monkeypatch)
    run("as-run", fresh(), ["no_rvq"], *SHORT)
    assert seen
    assert all(lengths == [total] * len(lengths) for total, lengths in seen)
    seen.clear()
    work = fresh()
    run("as-written", work, ["no_rvq"], *SHORT)
    samples = Manifest.read(work.data).rows.array("samples")
    frames = {load_encoder(work.root / "encoder").frames(int(n)) for n in samples}
    assert all(max(lengths) == total and set(lengths) <= frames for total, lengths in seen)
    assert any(min(lengths) < total for total, lengths in seen)


def test_the_study_s_schedule_never_leaves_the_warm_up(fresh: Callable[[], WorkFolder]) -> None:
    """30 epochs of 357 micro-batches in 45 updates; the schedule counts 10710, steps once each."""
    work = fresh()
    recipe = tiny_recipe("as-run", work, "finetune.batch_size=8", "finetune.accumulation=8")
    section = recipe.finetune.model_copy(update={"updates": 1350})
    plan = plan_of(section, np.full(2850, 160000), seed=42)
    assert plan.micro_batches_per_epoch == 357
    assert plan.updates_per_epoch == 45
    rate = learning_rate_of(section, plan)
    peak = section.optimizer.learning_rate
    assert rate(1350) == pytest.approx(peak * 1349 / 2142)
    assert rate(1350) / peak == pytest.approx(0.63, abs=0.001)

    (found,) = run("as-run", work, ["no_rvq"], "finetune.log_every=1", "finetune.updates=10")
    rates = [float(row["learning_rate"]) for row in rows(found) if row["split"] == "train"]
    total = 3 * 11 + 4  # ten updates: three epochs of 11 micro-batches in 3, and one more of 4
    warmup = round(0.2 * total)
    assert rates[:8] == pytest.approx([1e-3 * min(1.0, u / warmup) for u in range(8)])


# --------------------------------------------------------------------------------------- outcomes


def work_of(folder: Path, utterances: Sequence[tuple[str, int]]) -> WorkFolder:
    """A work folder of texts and samples, the first four to train on, and two encoders."""
    work = make_work(folder)
    shutil.rmtree(work.data)
    write_manifest(
        [
            Utterance(
                id=f"u{number}",
                split="train" if number < 4 else "valid",
                speaker="s",
                text=text,
                source=f"noise:{number}",
                audio=Noise(number, samples),
            )
            for number, (text, samples) in enumerate(utterances)
        ],
        work.data,
        corpus="synthetic",
        jobs=1,
    )
    save_encoder(work.root / "encoder")
    save_encoder(work.root / "layer_norm", "layer_norm")
    return work


def test_zeroed_utterances_are_counted(tmp_path: Path) -> None:
    """A transcript longer than its utterance has no alignment: no loss, no gradient, a count."""
    texts = ["AB", "BA", "ABBA" * 20, "A", "B", "AB" * 20]
    work = work_of(tmp_path, [(text, 9_600) for text in texts])
    sets = ["finetune.log_every=2", "finetune.validation.every=6"]
    (found,) = run("as-written", work, ["no_rvq"], *sets)
    *train, valid = rows(found)
    assert [row["zeroed"] for row in train] == ["4", "4", "4"]  # two updates of two epochs each
    assert valid["zeroed"] == "1"
    assert float(valid["ctc_loss"]) < 50


@pytest.mark.parametrize("encoder", ["encoder", "layer_norm"])
@pytest.mark.parametrize(
    ("protocol", "keep"),
    [("as-written", "float32"), ("as-written", "no"), ("as-run", "no"), ("corrected", "no")],
)
def test_an_utterance_without_a_frame_is_zeroed(
    tmp_path: Path, protocol: str, keep: str, encoder: str
) -> None:
    """Shorter than the 25 ms that a frame sees, alone in its batch."""
    work = work_of(tmp_path, [("A", 300), *[("AB", 9_600)] * 3, ("A", 399), ("B", 9_600)])
    sets = ["finetune.batch_size=1", "finetune.validation.batch_size=1", "finetune.log_every=1"]
    sets += [f"finetune.keep_features={keep}", "finetune.updates=2"]
    found = run(protocol, work, ["no_rvq", "rvq_2"], *sets, encoder=encoder)
    for folder in found:
        assert {row["zeroed"] for row in rows(folder)} == {"1"}
        assert all(np.isfinite(float(row["ctc_loss"])) for row in rows(folder))
        assert RunRecord.read(folder.record).status == "finished"


def test_mostly_empty_output_is_all_blank(fresh: Callable[[], WorkFolder]) -> None:
    """Where training passes through first: few tokens for many frames."""
    sets = ["finetune.updates=20", "finetune.optimizer.learning_rate=0.02"]
    (found,) = run("as-written", fresh(), ["no_rvq"], *sets)
    with open(found.hypotheses, encoding="utf-8", newline="") as file:
        texts = [row["hypothesis"] for row in csv.DictReader(file)]
    record = RunRecord.read(found.record)
    assert sum(not text for text in texts) > len(texts) / 2
    assert record.outcome == "all_blank"
    assert record.final["valid"]["blank_rate"] > 0.9  # type: ignore[operator]


# --------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """A work folder with one pretrained arm."""
    work = make_work(tmp_path_factory.mktemp("pretrained"))
    recipe = tiny_recipe("corrected", work, "pretrain.updates=2")
    pretrain(recipe, work, ONE, ["no_icsl_2cb"], [1])
    return work


def encoders(work: WorkFolder, folder: Path) -> Iterator[tuple[str, str]]:
    """The same weights in every form: what it is -> ``finetune.encoder``."""
    transformers = pytest.importorskip("transformers")
    model = work.run("pretrain", "no_icsl_2cb", 1).model
    yield "arm and seed", "no_icsl_2cb/seed-1"
    yield "each seed's own", "no_icsl_2cb/seed-{seed}"
    yield "with the pretraining head", str(model)
    yield "a path, each seed's own", str(model).replace("seed-1", "seed-{seed}")
    bare = transformers.Wav2Vec2Model.from_pretrained(model)
    bare.save_pretrained(folder / "bare")
    yield "bare, of transformers", str(folder / "bare")
    pickled = folder / "pickled"
    pickled.mkdir()
    shutil.copy(model / "config.json", pickled)
    whole = transformers.Wav2Vec2ForPreTraining.from_pretrained(model)
    torch.save(whole.state_dict(), pickled / "pytorch_model.bin")
    yield "pickled, with the pretraining head", str(pickled)


def test_the_same_encoder_in_every_form(pretrained: WorkFolder, tmp_path: Path) -> None:
    found = {}
    for number, (what, name) in enumerate(encoders(pretrained, tmp_path)):
        work = WorkFolder(tmp_path / f"work-{number}")
        shutil.copytree(pretrained.root, work.root)
        sets = [*SHORT, f"finetune.encoder={name}"]
        finetune(tiny_recipe("as-written", work, *sets), work, ONE, ["rvq_1"], [1])
        found[what] = work.run("finetune", "rvq_1", 1)
    expected = found["arm and seed"]
    for folder in found.values():
        assert_equal(folder, expected)

    # a finished recognizer is an encoder too
    work = WorkFolder(tmp_path / "again")
    shutil.copytree(pretrained.root, work.root)
    sets = [*SHORT, f"finetune.encoder={expected.model}"]
    finetune(tiny_recipe("as-written", work, *sets), work, ONE, ["rvq_1"], [1])
    assert_equal(work.run("finetune", "rvq_1", 1), expected)


def test_another_encoder_of_the_same_name_is_refused(fresh: Callable[[], WorkFolder]) -> None:
    work = fresh()
    run("as-written", work, ["no_rvq"], *SHORT)
    save_encoder(work.root / "encoder", seed=1)
    with pytest.raises(UsageError, match="encoder_sha256"):
        run("as-written", work, ["no_rvq"], *SHORT)


GO_ON = [
    *SHORT,
    "finetune.arms.no_rvq.encoder=finetune/rvq_1/seed-{seed}",
    "finetune.arms.rvq_2.encoder=finetune/no_rvq/seed-{seed}",
]


def test_arms_go_on_from_a_fine_tuned_encoder(fresh: Callable[[], WorkFolder]) -> None:
    """Whatever the order they are given in, the one that is stood on comes first."""
    work, again = fresh(), fresh()
    last, middle, first = run("as-written", work, ["rvq_2", "no_rvq", "rvq_1"], *GO_ON)
    (alone,) = run("as-written", again, ["rvq_1"], *SHORT)
    assert_equal(first, alone)
    for arm, found, of in (("no_rvq", middle, first), ("rvq_2", last, middle)):
        (expected,) = run("as-written", again, [arm], *SHORT, encoder=str(of.model))
        assert_equal(found, expected)


def test_an_arm_alone_asks_for_the_one_it_stands_on(
    fresh: Callable[[], WorkFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    work = fresh()
    with pytest.raises(DataError, match="2 of the runs can't begin") as raised:
        run("as-written", work, ["rvq_2", "no_rvq"], *GO_ON)
    assert raised.value.do.startswith("finetune it first: w2vrep finetune RECIPE")
    assert raised.value.do.endswith("--arm rvq_1 --seed 1")
    assert "rvq_2/seed-1: left out, the encoder finetune/no_rvq/seed-1" in capsys.readouterr().err


def test_what_stands_on_a_diverged_arm_is_left_out(fresh: Callable[[], WorkFolder]) -> None:
    work, wild = fresh(), "finetune.arms.rvq_1.optimizer.learning_rate=1e30"
    with pytest.raises(DivergedError, match=r"its encoder finetune/rvq_1/seed-1 diverged"):
        run("as-written", work, ["no_rvq", "rvq_1", "rvq_4"], *GO_ON, wild)
    assert not work.run("finetune", "no_rvq", 1).model.exists()
    assert work.run("finetune", "rvq_4", 1).model.exists()


def test_a_worker_stays_for_what_will_be_due(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves where others train all that is left, not where that opens more to train."""
    work = fresh()
    stood_on = work.run("finetune", "rvq_1", 1)
    stood_on.root.mkdir(parents=True)
    lock = RunLock(stood_on.lock, time.time(), "elsewhere")
    assert lock.take() == "taken"
    waits: list[list[Any]] = []

    def meanwhile(self: Any, units: list[Any]) -> None:
        waits.append(units)
        lock.release()

    monkeypatch.setattr(claiming._Grid, "wait", meanwhile)
    monkeypatch.setattr(claiming, "is_worker", lambda: True)
    run("as-written", work, ["no_rvq", "rvq_1"], *GO_ON)
    assert waits == [[(["no_rvq"], 1), (["rvq_1"], 1)]]
    assert work.run("finetune", "no_rvq", 1).model.exists()


def error_of(work: WorkFolder, encoder: str) -> DataError:
    recipe = tiny_recipe("as-written", work, f"finetune.encoder={encoder}")
    with pytest.raises(DataError) as raised:
        finetune(recipe, work, ONE, ["no_rvq"], [1])
    assert raised.value.exit_code == 3
    return raised.value


def test_what_to_do_without_the_encoder(
    fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = fresh()
    error = error_of(work, "no_icsl_2cb/seed-1")
    assert "w2vrep pretrain" in error.do
    assert "--arm no_icsl_2cb --seed 1" in error.do

    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = error_of(work, "facebook/wav2vec2-base")
    assert "0b5b8e868dd84f03fd87d01f9c4ff0f080fecfe8" in error.where
    assert "models/wav2vec2-base" in error.do
    assert "COMMIT" in error_of(work, "someone/else").do
    assert "config.json" in error_of(work, str(tmp_path / "nowhere")).do

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    error = error_of(work, "WAV2VEC2_BASE")
    assert "no network" in error.found
    assert "checkpoints" in error.do
    assert "WAV2VEC2_BASE" in error_of(work, "WAV2VEC3_BASE").do


def test_a_bundle_by_name(fresh: Callable[[], WorkFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchaudio's own model of these weights, through its loader."""
    work = fresh()
    torchaudio = import_torchaudio()
    ours = load_encoder(work.root / "encoder")
    shape = list(zip((16,) * 7, ours.config.conv_kernels, ours.config.conv_strides, strict=True))
    theirs = torchaudio.models.wav2vec2_model(
        "group_norm", shape, False, 32, 0.0, 8, 2, 2, 2, 0.1, 48, 0.1, 0.1, False, 0.1, None
    )
    theirs.feature_extractor.load_state_dict(ours.feature_extractor.state_dict())
    theirs.encoder.feature_projection.load_state_dict(ours.feature_projection.state_dict())
    theirs.encoder.transformer.load_state_dict(ours.transformer.state_dict())
    bundle = type(torchaudio.pipelines.WAV2VEC2_BASE)
    monkeypatch.setattr(bundle, "get_model", lambda self: theirs)
    recipe = tiny_recipe("as-written", work, *SHORT, "finetune.encoder=WAV2VEC2_BASE")
    with pytest.warns(UserWarning, match="no mask embedding"):
        finetune(recipe, work, ONE, ["no_rvq"], [1])
    as_recorded(again := fresh(), "encoder")  # as torchaudio's base models want it
    (expected,) = run("as-written", again, ["no_rvq"], *SHORT)
    found = work.run("finetune", "no_rvq", 1)
    assert_rows_close(rows(found), rows(expected), 1e-5)


def test_padded_lengths_hide_the_padding_from_the_quantizers(base: WorkFolder) -> None:
    with pytest.raises(RecipeError, match=r"rvq\.padding"):
        tiny_recipe("as-run", base, "finetune.rvq.padding=false")
