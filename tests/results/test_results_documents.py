"""What results/README.md says of the runs is what their files say."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from reproduce.records import RunRecord, WorkFolder
from reproduce.report.attribution import excess_curves, factorials
from reproduce.report.claims import DECIDED
from reproduce.report.measured import read_work
from reproduce.report.statistics import mean_interval

ROOT = Path(__file__).parents[2]
RESULTS, README = ROOT / "results", (ROOT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"\| (\S+\+mini\S*) \| (\d+) \| (\d+) "
    r"\| (-?[\d.]+) to (-?[\d.]+) \| (-?[\d.]+) to (-?[\d.]+) \|"
)
TOLD = ROW.findall((RESULTS / "README.md").read_text(encoding="utf-8"))


VOICES = {
    "corrected+mini+real-es": "Spanish",
    "corrected+mini+real-fr": "French",
    "corrected+mini+real-ru": "Russian",
}


def test_all_that_was_pretrained_is_told_of() -> None:
    assert [row[0] for row in TOLD] == ["corrected+mini", "as-run+mini", *VOICES]
    kept = {path.parents[2].name for path in RESULTS.glob("*/runs/pretrain/*")}
    assert kept == {row[0] for row in TOLD}


@pytest.mark.parametrize("row", TOLD, ids=lambda row: row[0])
def test_numbers_are_those_of_the_runs(row: tuple[str, ...]) -> None:
    name, finished, planned, *shown = row
    runs = WorkFolder(RESULTS / name / "runs").runs("pretrain")
    records = [RunRecord.read(run.record) for run in runs]
    final = [r.final["valid"] for r in records if r.status == "finished"]
    assert len(final) == int(finished) == int(planned)
    recipe = yaml.safe_load((RESULTS / name / "runs" / "recipe.yaml").read_text("utf-8"))
    arms = {record.arm for record in records}
    assert int(planned) == len(arms) * len(recipe["seeds"])
    assert arms >= set(recipe["pretrain"]["arms"])
    skills = [v["chance_loss"] - v["contrastive_loss"] for v in final]  # type: ignore[operator]
    speech = [v["speech_chance"] - v["speech_loss"] for v in final]  # type: ignore[operator]
    found = [min(skills), max(skills), min(speech), max(speech)]
    assert [f"{value:.3f}" for value in found] == shown


VERDICT = re.compile(r"^\| (C\d+) [^|]+\| ([a-z ]+) \| ([a-z ]+) \|$", re.MULTILINE)
EFFECT = re.compile(
    r"`icsl_8cb` less `no_icsl_8cb` (-?[\d.]+) nats \[(-?[\d.]+), (-?[\d.]+)\].*?"
    r"(-?[\d.]+) published",
    re.DOTALL,
)


def claims(recipe: str) -> dict[str, dict[str, str]]:
    with (RESULTS / recipe / "claims.csv").open(encoding="utf-8", newline="") as file:
        return {row["claim"]: row for row in csv.DictReader(file)}


def test_verdicts_on_the_first_screen_are_those_of_the_pages() -> None:
    told = {name: verdicts for name, *verdicts in VERDICT.findall(README)}
    as_run, corrected = claims("as-run+mini"), claims("corrected+mini")
    names = [name for name in corrected if "." not in name]
    assert told == {name: [as_run[name]["verdict"], corrected[name]["verdict"]] for name in names}


def test_the_effect_on_the_first_screen_is_that_of_the_page() -> None:
    (told,) = EFFECT.findall(README)
    row = claims("corrected+mini")["C1.3"]
    assert told == (row["measured"], row["low"], row["high"], row["published"])


@pytest.mark.parametrize("recipe", VOICES)
def test_effects_on_other_voices_are_those_of_their_pages(recipe: str) -> None:
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    row = claims(recipe)["C1.3"]
    assert row["seeds"] == "3"
    effect = f"{row['measured']} [{row['low']}, {row['high']}] nats"
    assert f"`icsl_8cb` less `no_icsl_8cb` in {VOICES[recipe]} {effect}" in text
    assert f"{VOICES[recipe]} ({row['measured']} nats [{row['low']}, {row['high']}])" in README
    decided = [c for c, row in claims(recipe).items() if row["verdict"] in DECIDED]
    assert decided == []  # so README may say that none is


def skills(recipe: str) -> list[tuple[float, float]]:
    """Over all masked frames and over speech, of each finished pretraining run."""
    runs = WorkFolder(RESULTS / recipe / "runs").runs("pretrain")
    final = [RunRecord.read(run.record).final["valid"] for run in runs]

    def under(v: Mapping[str, float | None], chance: str, loss: str) -> float:
        return v[chance] - v[loss]  # type: ignore[operator]

    return [
        (under(v, "chance_loss", "contrastive_loss"), under(v, "speech_chance", "speech_loss"))
        for v in final
    ]


def test_how_many_runs_know_what_is_counted_in_the_files() -> None:
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    english = skills("corrected+mini")
    assert min(all_frames for all_frames, _ in english) > 0.2
    assert max(speech / all_frames for all_frames, speech in english) < 0.5
    third = sum(speech < all_frames / 3 for all_frames, speech in english)
    assert f"(in {third} of {len(english)} runs less than a third), in one run none" in text
    assert sum(speech <= 0 for _, speech in english) == 1
    left = {VOICES[name]: [a >= 0.2 for a, _ in skills(name)] for name in VOICES}
    counts = {name: f"{sum(runs)} of {len(runs)} {name}" for name, runs in left.items()}
    assert "half of the Russian and three quarters of the Spanish runs learn less" in README
    assert [sum(left[name]) for name in ("French", "Russian", "Spanish")] == [12, 6, 3]
    assert f"{counts['French']}, {counts['Russian']} and {counts['Spanish']} runs" in text
    for name in ("fr", "ru"):
        assert max(speech for _, speech in skills(f"corrected+mini+real-{name}")) < 0.005


def test_what_can_be_seen_so_far_is_in_the_files() -> None:
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    with (RESULTS / "as-run+mini" / "table_finetune.csv").open(encoding="utf-8") as file:
        means = {row["arm"]: row["train_mean"] for row in csv.DictReader(file)}
    levels = ", ".join(means[f"rvq_{levels}"] for levels in (1, 2, 4, 8, 16))
    assert f"training windows {means['no_rvq']} without RVQ; {levels} with 1 to 16 levels" in text
    with (RESULTS / "as-written+mini" / "table_finetune.csv").open(encoding="utf-8") as file:
        written = {row["arm"]: row for row in csv.DictReader(file)}
    levels = ", ".join(written[f"rvq_{levels}"]["train_mean"] for levels in (1, 2, 4, 8, 16))
    assert f"as-written ends at {written['no_rvq']['train_mean']} and {levels}" in text
    assert all(float(row["wer"]) >= 1 for row in written.values())
    curve = claims("corrected+mini")["C6.1"]
    half = (float(curve["high"]) - float(curve["low"])) / 2
    assert f"{curve['measured']} nats (interval of {half:.3f} on either side)" in text
    assert f"moves by {abs(float(curve['published'])):.3f}" in text
    work = read_work(RESULTS / "as-run+mini" / "runs")
    (crossed,) = factorials(work)
    icsl, clipping = crossed.intervals["ICSL"], crossed.intervals["clipping"]
    assert (
        f"({icsl.mean:.2f} and {clipping.mean:.2f} nats, intervals of {icsl.half_width:.2f} and "
        f"{clipping.half_width:.2f} on either side)"
    ) in text
    first = [np.mean([c.values[0] for c in of]) for of in excess_curves(work).values()]
    assert f"over chance, {min(first):.2f} to {max(first):.2f} nats before" in text


def test_what_rvq_does_is_that_of_the_page() -> None:
    row = claims("corrected+mini")["C11.1"]
    effect = re.findall(r"`rvq_8` less `no_rvq` (\S+) nats \[(\S+), (\S+)\]", README)
    assert effect == [(row["measured"], row["low"], row["high"])]
    assert "falls from 1 to 2 and to 4 and rises from 8 to 16, each clear of zero" in README
    steps = [claims("corrected+mini")[f"C4.{part}"]["verdict"] for part in (1, 2, 3, 4)]
    assert steps == ["supported", "supported", "inconclusive", "supported"]
    with (RESULTS / "corrected+mini" / "table_finetune.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert f"that know something (WER {float(rows[0]['wer']):.2f})" in README
    shown = ("arm", "seeds", "valid_mean", "wer", "cer")
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    told = re.findall(
        r"^\| (\w*rvq\w*) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE
    )
    assert told == [tuple(row[name] for name in shown) for row in rows if row["seeds"] != "0"]


def test_what_cannot_be_tested_lacks_the_seeds_that_are_told() -> None:
    assert "in each, one of three with four levels ends without text" in README
    for claim, arm in (("C9", "plain8_rvq_4"), ("C10", "rvq_4_10min")):
        assert (
            f"seeds that know anything: {arm} 2 of 3;" in claims("corrected+mini")[claim]["caveat"]
        )
        runs = [
            WorkFolder(RESULTS / "corrected+mini" / "runs").run("finetune", arm, s)
            for s in (1, 2, 3)
        ]
        assert [RunRecord.read(run.record).outcome for run in runs].count("all_blank") == 1


def test_kept_runs_name_no_paths_of_a_machine() -> None:
    for file in RESULTS.glob("*/runs/**/*"):
        if file.suffix in (".json", ".yaml", ".csv", ".md"):
            assert not re.search(r"/(work|home|root|tmp|Users)/", file.read_text("utf-8")), file


def test_what_is_kept_stays_small() -> None:
    files = [file for file in RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    kinds = " ".join(sorted({file.suffix for file in files}))
    assert kinds == ".csv .html .json .md .npz .pdf .png .tex .yaml"  # no weights


def test_links_of_kept_pages_lead_somewhere() -> None:
    for page in RESULTS.glob("*/index.html"):
        links = re.findall(r'href="(?!#)([^"]+)"', page.read_text("utf-8"))
        assert [link for link in links if not (page.parent / link).is_file()] == [], page


def test_what_icsl_does_at_a_hundred_times_its_weight_is_in_the_files() -> None:
    """Paired over seeds, `icsl_8cb_x100` less `no_icsl_8cb`: cosine, mutual information, loss."""
    runs = WorkFolder(RESULTS / "corrected+mini" / "runs").runs("pretrain")
    records = [RunRecord.read(run.record) for run in runs]
    final = {(r.arm, r.seed): r.final["valid"] for r in records if r.status == "finished"}
    seeds = [seed for arm, seed in final if arm == "icsl_8cb_x100"]

    def mean(arm: str, name: str) -> float:
        return float(np.mean([final[arm, seed][name] for seed in seeds]))

    def change(name: str, decimals: int) -> str:
        arms = [[final[arm, s][name] for s in seeds] for arm in ("icsl_8cb_x100", "no_icsl_8cb")]
        found = mean_interval(np.subtract(*arms).tolist())  # type: ignore[call-overload]
        low, high = found.mean - found.half_width, found.mean + found.half_width
        return f"{found.mean:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"

    arms = ("no_icsl_8cb", "icsl_8cb", "icsl_8cb_x10", "icsl_8cb_x100")
    first, last = mean("no_icsl_8cb", "icsl"), mean("icsl_8cb_x100", "icsl")
    assert f"pulls codebooks apart (cosine {first:.2f} to {last:.2f})" in README
    cosines = ", ".join(f"{mean(arm, 'icsl'):.2f}" for arm in arms)
    text = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    assert f"the cosine between codebooks that it minimizes is {cosines}." in text
    assert f"mutual information changes by {change('code_nmi', 4)}" in text
    assert f"the loss by {change('contrastive_loss', 2)}" in text
