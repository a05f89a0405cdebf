"""The example of docs/extending.md runs, and does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny_runs import make_work

from reproduce.records import RunRecord

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "orthogonality", DOCS / "examples" / "orthogonality.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overlap_as_slow_as_obvious(example: ModuleType) -> None:
    books = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = np.mean(
        [
            float(torch.cosine_similarity(book[i], book[j], dim=0)) ** 2
            for book in books
            for i in range(5)
            for j in range(5)
            if i != j
        ]
    )
    assert float(example.entry_overlap(books)) == pytest.approx(expected, rel=1e-5)
    assert float(example.entry_overlap(torch.eye(4)[None])) == pytest.approx(0.0, abs=1e-7)


def test_the_example_trains_with_its_loss(
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = make_work(tmp_path, train=13)
    monkeypatch.setattr(example, "prepare", lambda *_: None)  # it is
    size = [f"corrected+{work.root / 'size.yaml'}", "--set", "seeds=[1]"]
    updates = ["--set", "pretrain.updates=6", "--set", "pretrain.optimizer.learning_rate=0.01"]

    def overlap(weight: float, root: Path) -> tuple[float, float]:
        monkeypatch.setattr(example.OrthogonalTask, "weight", weight)
        (root / "data").symlink_to(work.data) if root != work.root else None
        example.main([*size, *updates, "--work", str(root)])
        with np.load(root / "pretrain" / "no_icsl_8cb" / "seed-1" / "codes.npz") as codes:
            books = [torch.from_numpy(codes[f"codebooks_{when}"]) for when in ("first", "last")]
        first, last = (float(example.entry_overlap(book)) for book in books)
        return first, last

    (tmp_path / "without").mkdir()
    first, with_it = overlap(100.0, work.root)
    same, without = overlap(0.0, tmp_path / "without")
    assert first == same
    assert with_it < first
    assert with_it < without
    assert "index.html" in capsys.readouterr().out
    record = RunRecord.read(work.root / "pretrain" / "no_icsl_8cb" / "seed-1" / "run.json")
    assert record.status == "finished"
