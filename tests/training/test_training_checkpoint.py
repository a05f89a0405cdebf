"""Checkpoints: whole or absent, the newest two, back to the one before a damaged one."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reproduce.training import checkpoint as checkpoint_module
from reproduce.training.checkpoint import (
    CheckpointWriter,
    checkpoint_updates,
    drop_later_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_watch: list[Callable[[str], None]] = []


def _hook(event: str, about: tuple[Any, ...]) -> None:
    if _watch and event in CHANGES and not isinstance(about[0], int):
        _watch[-1](str(about[0]))


sys.addaudithook(_hook)  # can't be taken away: it does nothing while nobody watches


class Crash(BaseException):
    """The process ends here."""


@contextmanager
def crash_at(step: int, under: Path) -> Iterator[None]:
    """Crash before the step-th operation on files under a folder."""
    left = step

    def count(path: str) -> None:
        nonlocal left
        if path.startswith(str(under)):
            left -= 1
            if left == 0:
                raise Crash

    _watch.append(count)
    try:
        yield
    finally:
        _watch.pop()


def state(update: int) -> dict[str, Any]:
    return {
        "update": update,
        "weights": torch.arange(5.0) * update,
        "rows": {"train": {"loss": 0.1 * update, "split": "train", "wer": None}},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for update in (5, 10, 100, 20):  # by number, not by name
        save_checkpoint(tmp_path, update, state(update))
    assert checkpoint_updates(tmp_path) == [100, 20]
    assert names(tmp_path) == ["update-100", "update-20"]
    found = load_checkpoint(tmp_path, 20)
    assert torch.equal(found.pop("weights"), torch.arange(5.0) * 20)
    assert found == {k: v for k, v in state(20).items() if k != "weights"}


def test_no_folder_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_updates(tmp_path / "none") == []
    drop_later_checkpoints(tmp_path / "none", 0)


@pytest.mark.filterwarnings("error")
def test_whole_or_absent_wherever_saving_ends(tmp_path: Path) -> None:
    """Ended before any operation on files: nothing is damaged, which a warning would tell."""
    for step in range(1, 100):
        folder = tmp_path / str(step)
        for update in (1, 2):
            save_checkpoint(folder, update, state(update))
        try:
            with crash_at(step, folder):
                save_checkpoint(folder, 3, state(3))
        except Crash:
            pass
        else:
            break  # there are no more operations
        updates = checkpoint_updates(folder)
        assert updates in ([2, 1], [3, 2, 1], [3, 2])
        for update in updates:
            assert torch.equal(
                load_checkpoint(folder, update)["weights"], torch.arange(5.0) * update
            )
        drop_later_checkpoints(folder, updates[0])  # as a run that goes on does
        assert names(folder) == [f"update-{k}" for k in sorted(updates)]
        save_checkpoint(folder, 4, state(4))
        assert names(folder) == [f"update-{k}" for k in sorted(checkpoint_updates(folder))]
        assert len(names(folder)) == 2
    assert step > 8


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    """Hashed while it is written, without reading it again."""
    big = {"weights": torch.randn(300_000), "name": "x", "nested": [{"a": torch.ones(3)}, None]}
    path = save_checkpoint(tmp_path, 1, big)
    digest = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    assert json.loads((path / "sha256.json").read_text()) == {"state.pt": digest}


# ------------------------------------------------------------------------- off the training thread


def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path) -> None:
    """Training goes on in the same tensors while a checkpoint is being written."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moving = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": [1, "a"]}
    expected = copy.deepcopy(moving)
    writer, gate = CheckpointWriter(), threading.Event()
    save = checkpoint_module.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def late(*about: Any) -> Path:
            assert gate.wait(10)
            return save(*about)

        patch.setattr(checkpoint_module, "save_checkpoint", late)
        writer.save(1, [(tmp_path, moving)])
        optimizer.step()
        writer.check()  # nothing to tell yet
        assert checkpoint_updates(tmp_path) == []
        gate.set()
        writer.close()
    found = load_checkpoint(tmp_path, 1)
    assert found["rows"] == [1, "a"]
    for name, weight in expected["model"].items():
        assert torch.equal(found["model"][name], weight)
        assert not torch.equal(found["model"][name], model.state_dict()[name])
    for name, value in expected["optimizer"]["state"][0].items():
        assert torch.equal(found["optimizer"]["state"][0][name], value)
    assert found["model"]._metadata == expected["model"]._metadata
    assert "checkpoints_0" not in [thread.name for thread in threading.enumerate()]


def test_checkpoints_come_one_after_the_other(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    for update in (1, 2, 3):
        writer.save(update, [(tmp_path / arm, state(update)) for arm in "ab"])
    writer.wait()
    for arm in "ab":
        assert checkpoint_updates(tmp_path / arm) == [3, 2]
    writer.close()


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for later in (CheckpointWriter.check, CheckpointWriter.wait, CheckpointWriter.close):
        writer = CheckpointWriter()
        writer.save(1, [(tmp_path / "file", state(1))])
        while writer._saving is not None and not writer._saving.done():
            time.sleep(0.001)
        with pytest.raises(OSError):
            later(writer)
        writer.close()


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest", "no state", "empty digest"])
def test_back_to_the_one_before_a_damaged_one(tmp_path: Path, damage: str) -> None:
    for update in (1, 2):
        save_checkpoint(tmp_path, update, state(update))
    newest = tmp_path / "update-2"
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "cut":
        (newest / "state.pt").write_bytes(content[:-10])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    elif damage == "no digest":
        (newest / "sha256.json").unlink()
    elif damage == "no state":
        (newest / "state.pt").unlink()
    else:
        (newest / "sha256.json").write_text("")
    with pytest.warns(UserWarning, match="update-2 is damaged"):
        assert checkpoint_updates(tmp_path) == [1]
    save_checkpoint(tmp_path, 2, state(2))  # made anew, it takes the damaged one's place
    assert checkpoint_updates(tmp_path) == [2, 1]


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_damaged_one_costs_no_good_one_its_place(tmp_path: Path) -> None:
    """Going on from update 1 forgets what lies after it, so that two whole ones are kept."""
    for update in (1, 9):
        save_checkpoint(tmp_path, update, state(update))
    (tmp_path / "update-9" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        newest = checkpoint_updates(tmp_path)[0]
    drop_later_checkpoints(tmp_path, newest)
    for update in (2, 3):
        save_checkpoint(tmp_path, update, state(update))
    assert checkpoint_updates(tmp_path) == [3, 2]


def test_only_tensors_and_plain_values_are_loaded(tmp_path: Path) -> None:
    """A checkpoint holds no code: what would need some isn't loaded."""
    save_checkpoint(tmp_path, 1, {"path": Path("x")})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_checkpoint(tmp_path, 1)
