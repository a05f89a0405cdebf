"""Which encoder a fine-tuning arm stands on."""

from pathlib import Path

import pytest

from reproduce.errors import DataError, DivergedError
from reproduce.model.interop import PINNED
from reproduce.recipe import load_recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.tasks.bank import banks
from reproduce.tasks.encoders import encoder_path, settings_of_encoder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = WorkFolder(tmp_path / "w")
    for arm, seed in (("icsl_2cb", 1), ("icsl_2cb", 2), ("no_icsl_2cb", 1)):
        model = work.run("pretrain", arm, seed).model
        model.mkdir(parents=True)
        (model / "model.safetensors").write_text(f"{arm} {seed}")
    return work


def test_an_arm_and_seed_of_the_same_work_folder(work):
    recipe = load_recipe("smoke", ["finetune.encoder=icsl_2cb/seed-{seed}"])
    for seed in (1, 2):
        path = encoder_path(recipe, work, seed, "rvq_2")
        assert path == work.run("pretrain", "icsl_2cb", seed).model
    fixed = load_recipe("smoke", ["finetune.encoder=icsl_2cb/seed-1"])
    assert encoder_path(fixed, work, 2, "rvq_2") == work.run("pretrain", "icsl_2cb", 1).model


def test_an_arm_may_have_its_own(work):
    recipe = load_recipe("smoke", ["finetune.arms.rvq_2.encoder=icsl_2cb/seed-{seed}"])
    assert encoder_path(recipe, work, 1, "rvq_2").parent.parent.name == "icsl_2cb"
    assert encoder_path(recipe, work, 1, "rvq_4").parent.parent.name == "no_icsl_2cb"
    two, four = (settings_of_encoder(recipe, work, 1, arm) for arm in ("rvq_2", "rvq_4"))
    assert two["encoder_sha256"] != four["encoder_sha256"]


def test_arms_on_different_encoders_share_no_pass():
    arms = ["rvq_1", "rvq_2", "rvq_4"]
    together = load_recipe("as-written")
    assert banks(together, arms) == [arms]
    apart = load_recipe("as-written", ["finetune.arms.rvq_2.encoder=some/other"])
    assert banks(apart, arms) == [["rvq_1", "rvq_4"], ["rvq_2"]]


def test_an_encoder_that_is_not_finished(work):
    recipe = load_recipe("smoke", ["finetune.encoder=icsl_8cb/seed-{seed}"])
    with pytest.raises(DataError) as caught:
        encoder_path(recipe, work, 3, "rvq_2")
    assert caught.value.found == "the encoder pretrain/icsl_8cb/seed-3 isn't finished"
    assert "--arm icsl_8cb --seed 3" in caught.value.do


def test_an_encoder_that_diverged(work):
    """Also where its weights were still written, at its last validation."""
    run = work.run("pretrain", "icsl_2cb", 2)
    RunRecord("icsl_2cb", 2, status="failed", outcome="diverged").write(run.record)
    recipe = load_recipe("smoke", ["finetune.encoder=icsl_2cb/seed-{seed}"])
    with pytest.raises(DivergedError, match="its encoder pretrain/icsl_2cb/seed-2 diverged"):
        encoder_path(recipe, work, 2, "rvq_2")


def settings(work, name):
    recipe = load_recipe("smoke", [f"finetune.encoder={name}"])
    return settings_of_encoder(recipe, work, 1, "rvq_2")


def test_a_hub_name_is_its_commit(work):
    pinned = PINNED["facebook/wav2vec2-base"]
    recipe = load_recipe("smoke", ["finetune.encoder=facebook/wav2vec2-base"])
    assert str(encoder_path(recipe, work, 1, "rvq_2")) == f"facebook/wav2vec2-base@{pinned}"
    assert settings(work, "facebook/wav2vec2-base") == {"encoder_commit": pinned}
    assert settings(work, f"someone/model@{'ab' * 20}") == {"encoder_commit": "ab" * 20}
    assert settings(work, "WAV2VEC2_BASE") == {}


def test_a_path_from_here_or_from_home_is_its_files(work, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (Path("mine"), Path("home/mine")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")
    recipe = load_recipe("smoke", ["finetune.encoder=~/mine"])
    assert encoder_path(recipe, work, 1, "rvq_2") == tmp_path / "home/mine"
    assert settings(work, "~/mine") == settings(work, "mine") != {}
    Path("home/mine/model.safetensors").write_text("others")
    assert settings(work, "~/mine") != settings(work, "mine")
    with pytest.raises(DataError, match="no such folder"):
        settings(work, "~/nowhere")


def test_an_encoder_that_is_finished_but_not_here(work):
    """As in kept runs, which hold numbers and no weights."""
    run = work.run("pretrain", "no_icsl_2cb", 1)
    RunRecord("no_icsl_2cb", 1, status="finished").write(run.record)
    (run.model / "model.safetensors").unlink()
    with pytest.raises(DataError, match="finished, but its model isn't here") as caught:
        encoder_path(load_recipe("smoke"), work, 1, "no_rvq")
    assert "pretrain it again" in caught.value.do
