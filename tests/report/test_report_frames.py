from __future__ import annotations

from pathlib import Path

import pytest
from made_up_runs import write_recipe, write_run

from reproduce.report import load


def test_runs_curves_and_tables_as_frames(tmp_path: Path) -> None:
    write_recipe(tmp_path, "mine", seeds=[1, 2, 3], pretrain=["icsl_8cb"], finetune=["no_rvq"])
    for seed in (1, 2, 3):
        write_run(tmp_path, "pretrain", "icsl_8cb", seed, 4.1 + 0.01 * seed, points=8)
    write_run(tmp_path, "finetune", "no_rvq", 1, 3.0, points=8, status="running")
    frames = load(tmp_path)
    assert len(frames.runs) == 4
    assert frames.runs["counted"].tolist() == [True, True, True, False]
    last = frames.runs.set_index(["arm", "seed"])["valid_contrastive_loss"]
    assert last["icsl_8cb", 2] == pytest.approx(4.12)
    valid = frames.curves.query("stage == 'pretrain' and split == 'valid' and seed == 3")
    assert valid["update"].tolist() == [40, 80]
    assert valid["contrastive_loss"].iloc[-1] == pytest.approx(4.13)
    assert frames.pretrain.set_index("arm").loc["icsl_8cb", "mean"] == pytest.approx(4.12)
    assert set(frames.finetune["verdict"]) == {"not measured"}
    assert {"C1", "C1.1", "C11"} <= set(frames.claims["claim"])
