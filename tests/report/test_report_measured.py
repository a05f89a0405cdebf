from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_up_runs import write_recipe, write_run

from reproduce.errors import DataError
from reproduce.records import PRETRAIN_COLUMNS, WorkFolder
from reproduce.report.measured import (
    arms_of_a_series,
    codebooks_of,
    flatten,
    icsl_of,
    levels_of,
    read_metrics,
    read_run,
    read_work,
)

HEADER = ",".join(PRETRAIN_COLUMNS) + "\n"


def row(update: int, split: str, loss: str) -> str:
    return f"{update},{split},{loss}" + "," * (len(PRETRAIN_COLUMNS) - 3) + "\n"


def metrics(tmp_path: Path, text: str) -> dict[str, dict[str, np.ndarray]]:
    path = tmp_path / "metrics.csv"
    path.write_text(text, encoding="utf-8")
    return read_metrics(path, "pretrain")


def test_a_line_cut_off_is_left_out(tmp_path: Path) -> None:
    cut = row(20, "train", "4.61").rstrip("\n")[: len("20,train,4.")]
    found = metrics(tmp_path, HEADER + row(10, "train", "4.63") + cut)
    assert found["train"]["contrastive_loss"].tolist() == [4.63]


def test_a_cut_last_number_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    whole = row(20, "train", "4.6").rstrip("\n")  # the newline alone is missing
    found = metrics(tmp_path, HEADER + row(10, "train", "4.63") + whole)
    assert found["train"]["update"].tolist() == [10]


def test_nan_empty_and_odd_cells(tmp_path: Path) -> None:
    text = HEADER + row(10, "valid", "nan") + row(20, "valid", "") + row(30, "valid", "x")
    found = metrics(tmp_path, text + row(40, "valid", "4.6"))
    assert np.isnan(found["valid"]["contrastive_loss"][:3]).all()
    assert found["valid"]["contrastive_loss"][3] == 4.6


def test_rows_written_twice_count_once_the_last_time(tmp_path: Path) -> None:
    text = HEADER + row(10, "train", "5") + row(20, "train", "4") + HEADER + row(20, "train", "3")
    found = metrics(tmp_path, text + row(15, "train", "3.5"))
    assert found["train"]["update"].tolist() == [10, 15, 20]
    assert found["train"]["contrastive_loss"].tolist() == [5, 3.5, 3]


def test_header_alone_nothing_and_missing_columns(tmp_path: Path) -> None:
    assert metrics(tmp_path, HEADER) == {}
    assert metrics(tmp_path, "") == {}
    assert read_metrics(tmp_path / "none.csv", "pretrain") == {}
    found = metrics(tmp_path, "update,split,contrastive_loss\n10,train,4.6\n")
    assert np.isnan(found["train"]["grad_norm"]).all()
    with pytest.raises(ValueError, match="no update or split"):
        metrics(tmp_path, "a,b\n1,2\n")


def test_a_run_being_written_and_a_broken_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "pretrain", "icsl_2cb", 1, 4.6, status="running", final=False)
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert not run.counted
    assert run.final("valid", "contrastive_loss") == pytest.approx(4.6)
    (folder / "run.json").write_text('{"arm": "icsl_2cb"')
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert (run.status, run.problem) == ("no record", "run.json can't be read")
    (folder / "run.json").unlink()
    (folder / "metrics.csv").write_text("nonsense\n")
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert (run.status, run.problem) == ("no record", "metrics.csv can't be read")


def test_the_record_outlives_its_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "finetune", "rvq_4", 1, 3.5)
    (folder / "metrics.csv").unlink()
    run = read_run(next(WorkFolder(tmp_path).runs("finetune")))
    assert run.counted
    assert run.final("valid", "ctc_loss") == pytest.approx(3.5)


def test_a_loss_that_is_not_finite_is_not_measured(tmp_path: Path) -> None:
    write_run(tmp_path, "pretrain", "icsl_2cb", 1, float("nan"), outcome="diverged")
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert not run.counted
    assert run.final("valid", "contrastive_loss") is None


def test_planned_runs_are_missing_until_they_are_there(tmp_path: Path) -> None:
    write_recipe(tmp_path, "mine", seeds=[1, 2], pretrain=["icsl_2cb", "icsl_8cb"])
    write_run(tmp_path, "pretrain", "icsl_2cb", 2, 4.6)
    write_run(tmp_path, "pretrain", "extra", 7, 4.6)
    work = read_work(tmp_path)
    assert work.name == "mine"
    assert work.arms("pretrain") == ["icsl_2cb", "icsl_8cb", "extra"]
    assert work.missing("pretrain", "icsl_2cb") == [1]
    assert work.missing("pretrain", "icsl_8cb") == [1, 2]
    assert work.missing("pretrain", "extra") == []
    assert work.seeds("pretrain", "icsl_2cb") == {2}


def test_a_work_folder_without_a_recipe_is_named_after_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "copied", "pretrain", "icsl_2cb", 2, 4.6)
    assert read_work(tmp_path / "copied").name == "copied"


def test_bad_work_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such work folder"):
        read_work(tmp_path / "none")
    (tmp_path / "recipe.yaml").write_text("[a\n")
    with pytest.raises(DataError, match="not a recipe"):
        read_work(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("final", []), ("final", {"valid": 4.6}), ("final", {"valid": {"contrastive_loss": "low"}}),
     ("wall_seconds", None), ("versions", ["torch"]), ("started", 17), ("status", None),
     ("settings", "x"), ("updates_planned", "many"), ("device", {"name": "cpu"})],
)  # fmt: skip
def test_a_record_of_another_kind_is_not_believed(tmp_path: Path, key: str, value: object) -> None:
    folder = write_run(tmp_path, "pretrain", "icsl_2cb", 1, 4.6)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {key: value}))
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert (run.status, run.problem) == ("no record", "run.json can't be read")


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "pretrain", "icsl_2cb", 1, 4.6)
    record = json.loads((folder / "run.json").read_text())
    later = {"status": "paused", "outcome": "tired", "energy": {"kWh": 3}}
    (folder / "run.json").write_text(json.dumps(record | later))
    text = (folder / "metrics.csv").read_text().splitlines()
    longer = [line + ("," + "future" if k == 0 else ",1") for k, line in enumerate(text)]
    (folder / "metrics.csv").write_text("\n".join(longer) + "\n")
    run = read_run(next(WorkFolder(tmp_path).runs("pretrain")))
    assert (run.status, run.counted, run.problem) == ("paused", False, "")
    assert len(run.curve("valid", "contrastive_loss")) == 10


@pytest.mark.parametrize("seeds", [["a"], [None], "1", {}])
@pytest.mark.parametrize("arms", [None, [], {3: {}}, {"icsl_2cb": 1}, {"icsl_2cb": {"icsl": []}}])
def test_a_recipe_of_another_kind_plans_nothing(
    tmp_path: Path, seeds: object, arms: object
) -> None:
    recipe = {"name": 5, "seeds": seeds, "pretrain": {"arms": arms}, "finetune": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_run(tmp_path, "pretrain", "icsl_2cb", 1, 4.6)
    work = read_work(tmp_path)
    assert work.name == tmp_path.name
    assert work.values("pretrain", "icsl_2cb", "valid", "contrastive_loss") == pytest.approx([4.6])
    assert {seed for arm in work.arms("pretrain") for seed in work.missing("pretrain", arm)} <= {1}
    assert icsl_of("icsl_2cb", {"icsl.weight": []}) is True
    assert codebooks_of("icsl_2cb", {"quantizer.codebooks": "x"}) is None


def test_what_an_arm_is() -> None:
    assert codebooks_of("no_icsl_16cb", {}) == 16
    assert codebooks_of("mine", {"quantizer.codebooks": 3}) == 3
    assert codebooks_of("mine", {}) is None
    assert icsl_of("icsl_sq_8cb", {}) is True
    assert icsl_of("no_icsl_8cb", {}) is False
    assert icsl_of("mine", {"icsl.weight": 0.0}) is False
    assert (levels_of("no_rvq", {}), levels_of("rvq_16", {}), levels_of("x", {})) == (0, 16, None)
    assert levels_of("x", {"rvq.levels": 3}) == 3
    assert [levels_of(arm, {}) for arm in ("icsl8_rvq_4", "rvq_8_10min", "plain8_no_rvq")] == [
        4, 8, 0
    ]  # fmt: skip


def test_arms_of_a_series_are_not_taken_for_one_another() -> None:
    arms = ["no_rvq", "rvq_4", "rvq_4_10min", "icsl8_rvq_4", "rvq_16"]
    assert arms_of_a_series(arms, "finetune") == ["no_rvq", "rvq_4", "rvq_16"]
    arms = ["icsl_8cb", "icsl_sq_8cb", "icsl_8cb_x10", "att_icsl", "mine_3cb"]
    assert arms_of_a_series(arms, "pretrain") == ["icsl_8cb", "icsl_sq_8cb", "mine_3cb"]
    assert arms_of_a_series(["mine", "other"], "pretrain") == ["mine", "other"]


def test_flatten() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [1]}
    assert dict(flatten(tree)) == {"a.b": 1, "a.c": {}, "d": [1]}
