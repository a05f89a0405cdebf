"""A page made again from the kept runs is the same, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults import at_most
from made_up_runs import write_codes, write_recipe, write_run

from reproduce.errors import UsageError
from reproduce.report import build, build_report

HOME = "/home/jane doe/corpora"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Finished, diverged, damaged, cut-off and copied runs, and places on a machine."""
    root = tmp_path / "runs" / "mine"
    write_recipe(root, "mine", seeds=[1, 2, 3], pretrain=["no_icsl_8cb", "icsl_8cb"],
                 finetune=["no_rvq", "rvq_8"],
                 data={"root": HOME, "corpus": "librispeech", "subset": "10min"})  # fmt: skip
    (root / "data").mkdir()
    summary = {"subsets": {"10min": {"hours": 0.16}}, "rejected": [{"file": f"{HOME}/a.wav"}]}
    (root / "data" / "summary.json").write_text(json.dumps(summary))
    for seed in (1, 2, 3):
        for k, arm in enumerate(("no_icsl_8cb", "icsl_8cb")):
            run = write_run(root, "pretrain", arm, seed, 4.1 - 0.1 * k + 0.01 * seed,
                            columns={"speech_loss": 4.3, "speech_chance": 4.5},
                            settings={"data": {"root": HOME}})  # fmt: skip
            write_codes(run, rows=8, used=80)
            (run / "model").mkdir()
            (run / "model" / "model.safetensors").write_bytes(bytes(100_000))
        for arm in ("no_rvq", "rvq_8"):
            run = write_run(
                root, "finetune", arm, seed, 3.1 + 0.01 * seed, bank=["no_rvq", "rvq_8"]
            )
            if arm == "rvq_8":
                write_codes(run, rows=8, entries=256, used=100 + seed)
    failed = write_run(root, "pretrain", "extra_3cb", 4, float("nan"), status="failed", final=False,
                       outcome="diverged", reason=f"nan, see {HOME}/batch.json")  # fmt: skip
    (failed / "codes.npz").write_bytes(b"PK\x03\x04 not a whole archive")
    cut = write_run(root, "pretrain", "extra_3cb", 5, 4.2, status="running", final=False)
    text = (cut / "metrics.csv").read_text()
    (cut / "metrics.csv").write_text(text[: len(text) // 2])
    (write_run(root, "pretrain", "extra_3cb", 6, 4.2) / "run.json").write_text("{")
    (write_run(root, "finetune", "rvq_8", 7, 4.2) / "metrics.csv").write_text("nonsense\n")
    return root


def test_the_same_page_from_the_kept_runs(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "mine"
    build_report([work], out, keep=True)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    kept = out / "runs"
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "README.md", "recipe.yaml", "summary.json", "run.json", "metrics.csv", "codes.npz"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in files) < 15_000 * len([*kept.rglob("run.json")])
    for path in files:
        assert b"jane" not in path.read_bytes(), path
    with np.load(kept / "finetune" / "rvq_8" / "seed-1" / "codes.npz") as codes:
        assert "codebooks" not in codes.files
        assert codes["width"] == 8
    build_report([kept], out)
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_kept_runs_take_no_other_folders_place(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    # --out beside the folder runs/ that training writes
    with pytest.raises(UsageError, match="no --keep-runs wrote"):
        build_report([work], tmp_path, keep=True)
    assert (work / "recipe.yaml").is_file()
    out = tmp_path / "results"
    build_report([work], out, keep=True)
    (out / "runs" / "pretrain" / "gone" / "seed-1").mkdir(parents=True)
    build_report([work], out, keep=True)  # an earlier copy is replaced
    assert not (out / "runs" / "pretrain" / "gone").exists()
    assert yaml.safe_load((out / "runs" / "recipe.yaml").read_text())["data"]["root"] == "corpora"
    with pytest.raises(UsageError, match="kept ones already"):
        build_report([out / "runs"], out, keep=True)
    with pytest.raises(UsageError, match="of one work folder, not of 2"):
        build_report([work, out / "runs"], tmp_path / "both", keep=True)


def test_a_full_disk_leaves_the_report_before_as_it_was(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page, tables, figures and kept runs: all are new, or all are old."""
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    out = tmp_path / "out"

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    build_report([work], out, keep=True)
    before = everything()
    text = (work / "pretrain/icsl_8cb/seed-1/run.json").read_text()
    (work / "pretrain/icsl_8cb/seed-1/run.json").write_text(text.replace("0", "1"))
    page = (out / "index.html").stat().st_size
    for size in (0, 1000, page - 1):
        with at_most(size), pytest.raises(OSError, match="File too large"):
            build_report([work], out, keep=True)
        assert everything() == before
        assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    build_report([work], out, keep=True)
    assert everything().keys() == before.keys()
    assert everything() != before
