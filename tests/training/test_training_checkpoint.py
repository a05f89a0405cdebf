"""Checkpoints: whole or absent, the newest two, back to the one before a damaged one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reproduce.training.checkpoint import (
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
