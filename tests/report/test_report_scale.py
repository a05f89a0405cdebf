"""What a page says of its recipe's size, beside the study's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from made_up_runs import write_recipe, write_run

from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.recipe import load_recipe
from reproduce.report import build, build_report, keep, scale
from reproduce.report.measured import flatten, read_work


def test_all_of_the_size_is_told_beside_the_studys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates, parameters, hours and voices; kept runs say the same, and name no speaker."""
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    encoder = "../parts/finetune/no_rvq/seed-{seed}"
    write_recipe(tmp_path, "small", seeds=[1, 2, 3], pretrain=["icsl_8cb"], finetune=["rvq_4"],
                 data={"corpus": "librispeech", "subset": "all"})  # fmt: skip
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["model"] = load_recipe("corrected+mini").model_dump()["model"]
    recipe["finetune"]["encoder"] = encoder
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "data").mkdir()
    data = {"subsets": {"all": {"hours": 0.342}}, "speakers": {"train": ["ann", "bob"], "test": []}}
    (tmp_path / "data" / "summary.json").write_text(json.dumps(data))
    for seed in (1, 2, 3):
        write_run(tmp_path, "pretrain", "icsl_8cb", seed, 4.2)
        write_run(tmp_path, "finetune", "rvq_4", seed, 1.2, columns={"wer": 0.9})
    summary = build_report([tmp_path], tmp_path / "report")
    (told,) = (h["text"] for h in summary.data["headlines"] if h["topic"] == "size")
    assert re.search(
        r"pretraining of \d+ updates \(724\); fine-tuning of \d+ updates \(13\d\d\)", told
    )
    assert "encoders of 0.79 million parameters (94); 0.34 h of training data (10)" in told
    assert "2 speaker ids (251 at most)" in told
    assert "goes on from recognizers of another work folder" in told
    work = read_work(tmp_path)
    keep.keep_runs(work, tmp_path / "kept")
    kept = (tmp_path / "kept" / "runs" / "data" / "summary.json").read_text()
    assert json.loads(kept)["speakers"] == {"train": 2}
    again = build_report([tmp_path / "kept" / "runs"], tmp_path / "again")
    assert told in [h["text"] for h in again.data["headlines"]]


@pytest.mark.parametrize("recipe", ["as-run", "corrected+mini", "demo"])
def test_parameters_are_those_of_the_model(recipe: str) -> None:
    resolved = load_recipe(recipe)
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**resolved.model.model_dump()))
    counted = sum(weights.numel() for weights in encoder.parameters())
    assert scale.parameters(dict(flatten(resolved.model_dump()))) == counted
