"""Folder layout, metric columns and run.json."""

import json
import math
import os

import pytest

from reproduce import records
from reproduce.records import RunFolder, RunRecord, WorkFolder, write_text


def test_columns_are_the_published_ones():
    assert ",".join(records.PRETRAIN_COLUMNS) == (
        "update,split,contrastive_loss,chance_loss,speech_loss,speech_chance,diversity_loss,icsl,"
        "icsl_effective_weight,icsl_gradient_share,code_nmi,perplexity,mask_fraction,"
        "negatives_kept,learning_rate,gumbel_temperature,grad_norm,audio_seconds,wall_seconds"
    )
    assert ",".join(records.FINETUNE_COLUMNS) == (
        "update,split,ctc_loss,wer,cer,blank_rate,zeroed,learning_rate,grad_norm,rvq_mse,"
        "rvq_perplexity,rvq_dead_codes,audio_seconds,wall_seconds"
    )
    assert ",".join(records.MANIFEST_COLUMNS) == (
        "id,corpus,split,subset,speaker,seconds,samples,offset,text,source,sha256"
    )
    assert records.HYPOTHESES_COLUMNS == ("id", "reference", "hypothesis", "errors")
    assert records.METRIC_COLUMNS["pretrain"] is records.PRETRAIN_COLUMNS
    assert records.METRIC_COLUMNS["finetune"] is records.FINETUNE_COLUMNS


def test_layout(tmp_path):
    work = WorkFolder(tmp_path)
    run = work.run("pretrain", "icsl_8cb", 3)
    root = tmp_path / "pretrain" / "icsl_8cb" / "seed-3"
    assert run == RunFolder(root, "pretrain", "icsl_8cb", 3)
    assert run.name == "pretrain/icsl_8cb/seed-3"
    assert {
        name: str(getattr(run, name).relative_to(root))
        for name in ("metrics", "record", "checkpoints", "model", "codes", "hypotheses")
    } == {
        "metrics": "metrics.csv",
        "record": "run.json",
        "checkpoints": "checkpoints",
        "model": "model",
        "codes": "codes.npz",
        "hypotheses": "hypotheses.csv",
    }
    assert {
        name: str(getattr(work, name).relative_to(tmp_path))
        for name in ("recipe", "data", "manifest", "columns", "audio", "summary", "report")
    } == {
        "recipe": "recipe.yaml",
        "data": "data",
        "manifest": "data/manifest.csv",
        "columns": "data/manifest.arrow",
        "audio": "data/audio.pcm",
        "summary": "data/summary.json",
        "report": "report",
    }


def test_runs_are_found_in_order_and_other_folders_are_not(tmp_path):
    work = WorkFolder(tmp_path)
    for name in ("b/seed-10", "b/seed-9", "a/seed-1", "a/seed-x", "a/notes", "a/seed-1.old"):
        (tmp_path / "pretrain" / name).mkdir(parents=True)
    (tmp_path / "pretrain" / "a" / "seed-2").write_text("a file")
    (tmp_path / "pretrain" / "README").write_text("a file")
    assert [run.name for run in work.runs("pretrain")] == [
        "pretrain/a/seed-1",
        "pretrain/b/seed-9",
        "pretrain/b/seed-10",
    ]
    assert list(work.runs("finetune")) == []


def test_run_json_has_the_published_keys(tmp_path):
    path = tmp_path / "run.json"
    RunRecord("icsl_8cb", 3).write(path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {
        "status", "outcome", "final", "arm", "seed", "recipe_sha256", "manifest_sha256", "git",
        "versions", "device", "precision", "world_size", "started", "ended", "wall_seconds",
        "validation_seconds",
    } <= written.keys()  # fmt: skip
    assert (written["status"], written["outcome"]) == ("running", "ok")


def test_a_record_of_an_earlier_version_has_no_validation_seconds(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"arm": "rvq_4", "seed": 1, "wall_seconds": 2.5}', encoding="utf-8")
    record = RunRecord.read(path)
    assert (record.wall_seconds, record.validation_seconds) == (2.5, 0.0)


def test_a_record_comes_back_as_written(tmp_path):
    path = tmp_path / "run.json"
    record = RunRecord(
        "rvq_4",
        1,
        status="finished",
        outcome="all_blank",
        final={"valid": {"ctc_loss": 3.25, "wer": None}},
        versions={"torch": "2"},
        settings={"finetune": {"updates": 3, "betas": [0.9, 0.98]}},
        reason="Größe ≥ 3",
        wall_seconds=1.5,
    )
    record.write(path)
    assert RunRecord.read(path) == record


def test_what_json_does_not_know_is_null(tmp_path):
    path = tmp_path / "run.json"
    RunRecord("a", 1, final={"valid": {"x": math.nan, "y": -math.inf, "z": 1.0}}).write(path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert RunRecord.read(path).final["valid"] == {"x": None, "y": None, "z": 1.0}


def test_keys_of_later_versions_are_ignored(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"arm": "a", "seed": 1, "colour": "blue"}', encoding="utf-8")
    assert RunRecord.read(path) == RunRecord("a", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"arm": "a"}', '{"seed": 1}'])
def test_what_is_no_record(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        RunRecord.read(path)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "öne\r\n")
    assert path.read_bytes() == "öne\r\n".encode()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "two")
    assert path.read_bytes() == "öne\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
