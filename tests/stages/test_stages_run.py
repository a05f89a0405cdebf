"""run: what is checked before it begins, and how it ends when something goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import make_work, tiny_recipe

import reproduce.stages.run as stage
from reproduce.errors import (
    DataError,
    DivergedError,
    FailedRunsError,
    InterruptedRun,
    MissingCorpusError,
    UsageError,
    W2vrepError,
)
from reproduce.recipe import load_recipe
from reproduce.records import RunRecord, WorkFolder
from reproduce.stages.fleet import Hands
from reproduce.tasks.pretraining import PretrainTask
from reproduce.tasks.recognition import FinetuneTask
from reproduce.training.distributed import Ranks
from reproduce.training.loop import Terms

SETS = [
    "seeds=[1, 2]",
    "pretrain.updates=1",
    "finetune.updates=1",
    "pretrain.arms=[no_icsl_2cb]",
    "finetune.arms=[no_rvq, rvq_2]",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    return make_work(tmp_path_factory.mktemp("run"), train=9)


@pytest.fixture
def work(prepared: WorkFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkFolder:
    """Prepared; a report is only noted, as the runs that it would see."""
    shutil.copytree(prepared.root, tmp_path, dirs_exist_ok=True)
    work = WorkFolder(tmp_path)
    monkeypatch.setattr(stage, "prepare", lambda *_: None)
    monkeypatch.setattr(stage, "summary_lines", lambda _: [])

    def report(folders: list[Path], out: Path) -> Any:
        (work.root / "reported").write_text("\n".join(statuses(WorkFolder(folders[0]))))
        return SimpleNamespace(page=out / "index.html")

    monkeypatch.setattr(stage, "build_report", report)
    return work


def statuses(work: WorkFolder) -> list[str]:
    return [
        f"{run.name} {RunRecord.read(run.record).status}"
        for name in ("pretrain", "finetune")
        for run in work.runs(name)  # type: ignore[arg-type]
        if run.record.exists()
    ]


def run(work: WorkFolder, *sets: str) -> list[str]:
    said: list[str] = []
    recipe = tiny_recipe("corrected", work, *SETS, *sets)
    stage.run(recipe, work, Ranks(0, 1, torch.device("cpu")), said.append)
    return said


def run_fails(work: WorkFolder, *sets: str) -> W2vrepError:
    with pytest.raises(W2vrepError) as raised:
        run(work, *sets)
    return raised.value


def poison_pretraining(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    forward = PretrainTask.forward

    def poisoned(self: PretrainTask, *position: Any) -> dict[str, Terms]:
        terms = forward(self, *position)
        if self.seed == seed:
            terms[self.name].loss = terms[self.name].loss * float("nan")
        return terms

    monkeypatch.setattr(PretrainTask, "forward", poisoned)


def test_an_encoder_that_diverged_stops_only_what_stands_on_it(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_pretraining(monkeypatch, seed=1)
    error = run_fails(work)
    assert isinstance(error, DivergedError)
    assert error.exit_code == 4
    assert "2 of the runs diverged" in error.found
    assert "finetune/no_rvq/seed-1 (its encoder pretrain/no_icsl_2cb/seed-1 div" in error.found
    assert "finetune/rvq_2/seed-1: left out, its encoder" in capsys.readouterr().err
    expected = ["pretrain/no_icsl_2cb/seed-1 failed", "pretrain/no_icsl_2cb/seed-2 finished"]
    expected += [f"finetune/{arm}/seed-2 finished" for arm in ("no_rvq", "rvq_2")]
    assert (work.root / "reported").read_text().splitlines() == expected
    assert not work.run("finetune", "no_rvq", 1).root.exists()


def test_a_missing_encoder_is_told_after_the_rest_is_done(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another machine pretrains it."""
    run(work)
    shutil.rmtree(work.root / "finetune")
    shutil.rmtree(work.run("pretrain", "no_icsl_2cb", 1).root)
    monkeypatch.setattr(stage, "pretrain", lambda *_: None)
    error = run_fails(work)
    assert isinstance(error, DataError)
    assert error.exit_code == 3
    assert "finetune/no_rvq/seed-1, finetune/rvq_2/seed-1" in error.found
    assert "pretrain/no_icsl_2cb/seed-1 isn't finished" in error.found
    assert "--arm no_icsl_2cb --seed 1" in error.do
    assert "finetune/rvq_2/seed-2 finished" in (work.root / "reported").read_text()


def test_the_report_is_made_whatever_fine_tuning_raises(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "forward", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(work)
    assert "finetune/no_rvq/seed-1 failed" in (work.root / "reported").read_text()


def test_workers_train_one_stage_after_the_other(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in the first is told after the report."""
    hands, done = Hands("2", None, ["smoke"]), []

    def train(given: Hands, name: str, *grid: Any) -> None:
        done.append((given, name, *grid[-2:]))
        if name == "pretrain":
            raise FailedRunsError("one is lost")

    monkeypatch.setattr(stage, "train_by", train)
    recipe = tiny_recipe("corrected", work, *SETS)
    with pytest.raises(FailedRunsError, match="one is lost"):
        stage.run(recipe, work, Ranks(0, 1, torch.device("cpu")), lambda _: None, hands)
    assert done == [
        (hands, "pretrain", ["no_icsl_2cb"], [1, 2]),
        (hands, "finetune", ["no_rvq", "rvq_2"], [1, 2]),
    ]
    assert (work.root / "reported").exists()


def test_an_interrupted_run_makes_no_report(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = FinetuneTask.begin_update

    def stop(self: FinetuneTask, *update: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        begin(self, *update)

    monkeypatch.setattr(FinetuneTask, "begin_update", stop)
    with pytest.raises(InterruptedRun):
        run(work)
    assert not (work.root / "reported").exists()


@pytest.mark.parametrize(
    ("encoder", "found"),
    [
        ("~/nowhere/encoder", "no such folder"),
        ("facebook/wav2vec2-base", "can't be fetched"),
        ("someone/model", "lacks a commit"),
        ("someone/model@main", "'main' is not a commit"),
    ],
)
def test_an_encoder_from_elsewhere_is_there_before_anything_begins(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder: str, found: str
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = run_fails(work, f"finetune.arms.rvq_2.encoder={encoder}")
    assert found in error.found
    assert error.exit_code == 3
    assert statuses(work) == []


def test_the_corpus_is_looked_for_before_encoders_are(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless what was prepared from it stands in for it, or it can be fetched."""
    asked: list[str] = []
    monkeypatch.setattr(stage, "check_encoders", lambda *_: asked.append("encoders"))
    monkeypatch.setattr(stage, "pretrain", lambda *_: asked.append("pretrain"))
    monkeypatch.setattr(stage, "finetune", lambda *_: None)
    librispeech = ["data.corpus=librispeech"]
    empty = WorkFolder(tmp_path / "empty")
    ranks = Ranks(0, 1, torch.device("cpu"))

    def run(folder: WorkFolder, *sets: str) -> None:
        stage.run(load_recipe("as-run", [*SETS, *librispeech, *sets]), folder, ranks, print)

    with pytest.raises(UsageError, match="corpus librispeech needs a folder") as caught:
        run(empty)
    assert "--set data.root=/path/to/librispeech" in caught.value.do
    for where, found in ((tmp_path / "none", "no such folder"), (tmp_path, "no part train-clean-")):
        with pytest.raises(MissingCorpusError, match=found):
            run(empty, f"data.root={where}")
    assert asked == []
    run(empty, f"data.root={tmp_path / 'none'}", "data.download=true")
    run(work)
    assert asked == ["encoders", "pretrain"] * 2
