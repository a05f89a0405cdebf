"""What results/README.md says of the runs is what their files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reproduce.records import RunRecord, WorkFolder

RESULTS = Path(__file__).parents[2] / "results"
ROW = re.compile(
    r"\| (\S+\+mini) \| (\d+) \| (\d+) \| (-?[\d.]+) to (-?[\d.]+) \| (-?[\d.]+) to (-?[\d.]+) \|"
)
TOLD = ROW.findall((RESULTS / "README.md").read_text(encoding="utf-8"))


def test_both_recipes_are_told_of() -> None:
    assert [row[0] for row in TOLD] == ["corrected+mini", "as-run+mini"]


@pytest.mark.parametrize("row", TOLD, ids=lambda row: row[0])
def test_numbers_are_those_of_the_runs(row: tuple[str, ...]) -> None:
    name, finished, planned, *shown = row
    runs = WorkFolder(RESULTS / name / "runs").runs("pretrain")
    records = [RunRecord.read(run.record) for run in runs]
    final = [r.final["valid"] for r in records if r.status == "finished"]
    assert len(final) == int(finished) <= int(planned)
    skills = [v["chance_loss"] - v["contrastive_loss"] for v in final]  # type: ignore[operator]
    speech = [v["speech_chance"] - v["speech_loss"] for v in final]  # type: ignore[operator]
    found = [min(skills), max(skills), min(speech), max(speech)]
    assert [f"{value:.3f}" for value in found] == shown


def test_kept_runs_name_no_paths_of_a_machine() -> None:
    for file in RESULTS.glob("*/runs/**/*"):
        if file.suffix in (".json", ".yaml", ".csv", ".md"):
            assert not re.search(r"/(work|home|root|tmp|Users)/", file.read_text("utf-8")), file


def test_links_of_kept_pages_lead_somewhere() -> None:
    for page in RESULTS.glob("*/index.html"):
        links = re.findall(r'href="(?!#)([^"]+)"', page.read_text("utf-8"))
        assert [link for link in links if not (page.parent / link).is_file()] == [], page
