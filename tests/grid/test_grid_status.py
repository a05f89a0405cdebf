"""status: what the files of a grid say, without torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reproduce.cli import main
from reproduce.grid.lock import RunLock
from reproduce.grid.status import (
    duration,
    grid_runs,
    run_state,
    status_lines,
    summary_line,
)
from reproduce.recipe import load_recipe
from reproduce.records import METRIC_COLUMNS, RunFolder, RunRecord, Stage, Status, WorkFolder


def make(
    run: RunFolder,
    status: Status = "running",
    rows: tuple[tuple[int, str, float, float, float], ...] = (),
    **about: object,
) -> RunFolder:
    """A run's files; rows: update, split, loss, chance or WER, wall seconds."""
    record = RunRecord(run.arm, run.seed, status=status, updates_planned=150)
    for name, value in about.items():
        setattr(record, name, value)
    record.write(run.record)
    columns = METRIC_COLUMNS[run.stage]
    loss, beside = (
        ("contrastive_loss", "chance_loss") if run.stage == "pretrain" else ("ctc_loss", "wer")
    )
    lines = [",".join(columns)]
    for update, split, value, other, wall in rows:
        cells = {"update": update, "split": split, loss: value, beside: other, "wall_seconds": wall}
        lines.append(",".join(str(cells.get(column, "")) for column in columns))
    run.metrics.write_text("\n".join(lines) + "\n")
    return run


def run_in(tmp_path: Path, stage: Stage = "pretrain", arm: str = "icsl_2cb") -> RunFolder:
    run = WorkFolder(tmp_path).run(stage, arm, 1)
    run.root.mkdir(parents=True)
    return run


def test_a_run_that_nobody_began(tmp_path: Path) -> None:
    state = run_state(WorkFolder(tmp_path).run("pretrain", "icsl_2cb", 1), 150)
    assert (state.state, state.update, state.updates) == ("waiting", 0, 150)
    assert (state.train, state.valid, state.last_sign, state.seconds_left) == (None,) * 4


def test_a_run_in_training(tmp_path: Path) -> None:
    """Its pace is that of its newer rows: 20 updates in 40 s, 100 are left."""
    run = make(
        run_in(tmp_path),
        rows=(
            (10, "train", 4.6, 4.7, 100.0),
            (30, "train", 4.5, 4.7, 110.0),
            (40, "train", 4.3, 4.7, 130.0),
            (50, "valid", 4.25, 4.5, 150.0),
        ),
    )
    lock = RunLock(run.lock, 0.0, "cuda 3")
    lock.take()
    state = run_state(run, 99)
    assert (state.state, state.update, state.updates) == ("training", 50, 150)
    assert (state.train, state.valid, state.beside) == (4.3, 4.25, 4.5)
    assert state.seconds_left == pytest.approx(100 * 40 / 20)
    assert (state.holder.host, state.holder.device) == (socket.gethostname(), "cuda 3")
    assert abs((state.last_sign or 0) - time.time()) < 60
    lock.release()
    assert run_state(run, 99).state == "gone"  # nobody's name is left


def test_a_run_whose_holder_is_gone(tmp_path: Path) -> None:
    run = make(run_in(tmp_path))
    code = (
        "import os\nfrom pathlib import Path\nfrom reproduce.grid.lock import RunLock\n"
        f"RunLock(Path({str(run.lock)!r}), 0.0).take()\nprint(os.getpid())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    state = run_state(run, 150)
    assert (state.state, state.holder.pid) == ("gone", int(done.stdout))
    assert state.seconds_left is None
    (told,) = [line for line in status_lines([state]) if line.startswith(run.name + ":")]
    assert f"process {state.holder.pid} on {socket.gethostname()} is gone" in told


@pytest.mark.parametrize(
    ("status", "outcome", "expected", "over"),
    [
        ("finished", "ok", "finished", True),
        ("failed", "diverged", "diverged", True),
        ("failed", "ok", "failed", True),
        ("interrupted", "ok", "interrupted", False),
    ],
)
def test_runs_that_ended(
    tmp_path: Path, status: Status, outcome: str, expected: str, over: bool
) -> None:
    run = make(run_in(tmp_path), status, outcome=outcome, updates=150, reason="why")
    state = run_state(run, 1)
    assert (state.state, state.update, state.over) == (expected, 150, over)
    told = [line for line in status_lines([state]) if line == f"{run.name}: why"]
    assert len(told) == (0 if expected == "finished" else 1)


def test_files_that_are_being_written(tmp_path: Path) -> None:
    run = make(run_in(tmp_path, "finetune", "rvq_4"), rows=((5, "valid", 3.0, 0.9, 20.0),))
    with open(run.metrics, "a") as file:
        file.write("10,train,2.")
    assert (run_state(run, 1).update, run_state(run, 1).beside) == (5, 0.9)
    run.record.write_text('{"arm": ')
    assert run_state(run, 80).updates == 80
    run.metrics.write_bytes(b"\xff\xfe\x00")
    assert run_state(run, 80).valid is None


def test_the_grid_in_the_order_of_training(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", ["pretrain.arms=[icsl_2cb, no_icsl_2cb]", "seeds=[3, 1]"])
    names = [run.name for run, _ in grid_runs(recipe, WorkFolder(tmp_path), ["pretrain"])]
    assert names == [f"pretrain/{arm}/seed-{s}" for s in (3, 1) for arm in recipe.pretrain.arms]
    few = grid_runs(recipe, WorkFolder(tmp_path), arms=["rvq_4"], seeds=[1])
    assert [(run.name, updates) for run, updates in few] == [("finetune/rvq_4/seed-1", 8)]


def test_the_line_that_counts(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    make_of: list[tuple[str, Status]] = [("a", "finished"), ("b", "finished"), ("c", "interrupted")]
    for arm, status in make_of:
        work.run("pretrain", arm, 1).root.mkdir(parents=True)
        make(work.run("pretrain", arm, 1), status)
    states = [run_state(work.run("pretrain", arm, 1), 10) for arm in "abcd"]
    assert summary_line(states) == "2 of 4 finished, 1 interrupted, 1 waiting"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (-3.0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"),
     (3900, "1 h 05 min"), (90_000, "1 d 1 h")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    make(
        run_in(tmp_path, arm="no_icsl_2cb"),
        "finished",
        ((150, "valid", 4.1, 4.6, 9.0),),
        updates=150,
    )
    code = (
        "import sys\nfrom reproduce.cli import main\n"
        f"try: main(['status', 'mini', '--work', {str(tmp_path)!r}, '--arm', 'no_icsl_2cb', "
        "'--seed', '1'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "print(*sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    head, row, count = done.stdout.splitlines()
    assert head.split()[:3] == ["run", "state", "update"]
    assert row.split()[:5] == [
        "pretrain/no_icsl_2cb/seed-1",
        "finished",
        "150/150",
        "4.1000",
        "4.6000",
    ]
    assert count == "1 of 1 finished"


def test_watching_ends_with_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(run_in(tmp_path, arm="no_icsl_2cb"))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        make(run, "finished", updates=150)

    monkeypatch.setattr(time, "sleep", wait)
    command = ["status", "mini", "--work", str(tmp_path), "--arm", "no_icsl_2cb", "--seed", "1"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--watch"])
    assert done.value.code == 0
    assert waits == [5]
    counts = [line for line in capsys.readouterr().out.splitlines() if " of 1 finished" in line]
    assert counts == ["0 of 1 finished, 1 gone", "1 of 1 finished"]


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["status", "mini", "--work", str(tmp_path / "none")])
    assert done.value.code == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
