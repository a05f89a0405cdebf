from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from made_up_runs import CHANCE, LEVELS, PRETRAIN_ARMS, write_codes, write_recipe, write_run
from PIL import Image

from reproduce.errors import DataError, UsageError
from reproduce.report import ReportSummary, build, build_report, figures, scale
from reproduce.report.build import named_apart
from reproduce.report.caveats import caveat
from reproduce.report.measured import codebooks_of, read_work
from reproduce.report.privacy import without_paths
from reproduce.report.published import load_published
from reproduce.report.tables import CLAIMS_TABLE, FINETUNE_TABLE, PRETRAIN_TABLE
from reproduce.shipped import shipped

FIGURES = (
    "fig2_pretrain_train", "fig3_pretrain_valid", "fig4_codebooks", "fig5_finetune_train",
    "fig6_finetune_valid", "fig7_rvq_levels",
)  # fmt: skip
CODE_FIGURES = (
    "codebook_usage", "codebook_similarity", "codebook_information", "rvq_residual",
    "rvq_perplexity",
)  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportSummary]:
    """Three seeds: learning, two arms at chance, a crash, blanks, a run missing."""
    root = tmp_path_factory.mktemp("runs") / "made-up"
    write_recipe(root, "corrected<b>_mini", seeds=[1, 2, 3])
    for seed in (1, 2, 3):
        for k, arm in enumerate(PRETRAIN_ARMS):
            loss = 4.4 - 0.02 * k + 0.001 * seed + 0.0003 * ((7 * k * seed) % 5)
            if arm == "icsl_16cb" and seed == 3:
                continue
            if arm == "no_icsl_16cb" and seed == 1:
                write_run(root, "pretrain", arm, seed, float("nan"), status="failed",
                          outcome="diverged", final=False,
                          reason="non-finite loss, see /home/someone/batch.json")  # fmt: skip
            elif arm == "icsl_4cb" and seed == 3:
                run = write_run(root, "pretrain", arm, seed, loss, status="running", final=False)
                text = (run / "metrics.csv").read_text()
                (run / "metrics.csv").write_text(text[: len(text) // 2])
            elif arm.endswith("_2cb"):
                loss = (4.6141 if arm.startswith("no") else 4.6133) + 0.00001 * (seed - 2)
                write_run(root, "pretrain", arm, seed, loss, outcome="at_chance")
            else:
                run = write_run(root, "pretrain", arm, seed, loss)
                if "_8cb" in arm:
                    write_codes(run, rows=8, used=80, shift=-0.1 if arm == "icsl_8cb" else 0.0)
        for k, (arm, levels) in enumerate(LEVELS.items()):
            run = write_run(
                root, "finetune", arm, seed, 3.5 - 0.1 * k + 0.002 * ((k * seed) % 3),
                train_loss=3.0 - 0.1 * k, outcome="all_blank" if k < 2 else "ok",
                steepness=4 + k / 2,
            )  # fmt: skip
            if levels:
                write_codes(run, rows=levels, entries=256)
                if seed == 3:
                    (run / "codes.npz").write_bytes(b"PK\x03\x04 not a whole archive")
    out = root / "report"
    return out, build_report([root], out)


def test_every_file_of_the_contract(built: tuple[Path, ReportSummary]) -> None:
    out, summary = built
    names = {path.name for path in out.iterdir()}
    assert names == {
        "index.html", "summary.json", "claims.csv", "claims.md",
        *(f"table_{stage}.{kind}" for stage in ("pretrain", "finetune")
          for kind in ("csv", "md", "tex")),
        *(f"{figure}.{kind}" for figure in FIGURES + CODE_FIGURES for kind in ("png", "pdf")),
    }  # fmt: skip
    assert summary.page == out / "index.html"
    assert json.loads((out / "summary.json").read_text()) == summary.data
    assert summary.as_json()["page"] == str(summary.page)


def test_pictures_have_few_colours_and_say_their_size(built: tuple[Path, ReportSummary]) -> None:
    for name in FIGURES + CODE_FIGURES:
        with Image.open(built[0] / f"{name}.png") as picture:
            assert picture.mode == "P", name
            assert picture.info["dpi"] == pytest.approx((figures.DPI,) * 2, abs=0.1)


def test_pretraining_table(built: tuple[Path, ReportSummary]) -> None:
    rows = {row["arm"]: row for row in table(built[0] / "table_pretrain.csv")}
    assert tuple(rows["icsl_8cb"]) == PRETRAIN_TABLE
    assert list(rows) == PRETRAIN_ARMS
    chance = rows["no_icsl_2cb"]
    assert (chance["verdict"], chance["caveat"]) == ("reproduced", "at chance")
    assert chance["published"] == chance["mean"] == "4.6141"
    assert float(chance["skill"]) == pytest.approx(CHANCE - 4.6141, abs=1e-4)
    assert rows["icsl_8cb"]["speech_skill"] == ""  # old runs have no such column
    assert rows["icsl_8cb"]["verdict"] == "differs"
    assert float(rows["icsl_8cb"]["low"]) < float(rows["icsl_8cb"]["mean"]) < 4.4
    for arm, expected in {
        "no_icsl_16cb": "1 of 3 diverged", "icsl_16cb": "1 of 3 missing",
        "icsl_4cb": "1 of 3 running",
    }.items():  # fmt: skip
        row = rows[arm]
        assert (row["verdict"], row["caveat"], row["seeds"]) == ("too few seeds", expected, "2")
        assert row["low"] == row["high"] == ""


def test_a_verdict_that_frames_of_speech_do_not_bear_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    write_recipe(tmp_path, "speech", seeds=[1, 2, 3], finetune=[])
    for seed in (1, 2, 3):
        for arm in PRETRAIN_ARMS:
            no_icsl = arm.startswith("no")
            size = {"2": 1, "4": 2, "8": 3, "6": 4}[arm[-3]]
            loss = 3.9 + 0.05 * size * (1 if no_icsl else -1) + 0.001 * ((seed * size) % 3)
            speech = 4.1 + (0.05 * size if no_icsl else 0.02 * seed * (-1.0) ** size)
            columns = {"speech_loss": speech, "speech_chance": 4.5}
            write_run(tmp_path, "pretrain", arm, seed, loss, points=8, columns=columns)
    summary = build_report([tmp_path], tmp_path / "report")
    claims = {claim["claim"]: claim for claim in summary.data["claims"]}
    assert claims["C2"]["verdict"] == claims["C3"]["verdict"] == "supported"
    assert "over frames of speech" not in claims["C2"]["caveat"]
    assert "over frames of speech alone: inconclusive" in claims["C3"]["caveat"]
    rows = {row["arm"]: row for row in table(tmp_path / "report" / "table_pretrain.csv")}
    assert float(rows["no_icsl_8cb"]["speech_skill"]) == pytest.approx(4.5 - 4.25)
    topics = {f["topic"]: f["text"] for f in summary.data["findings"] if f["recipe"]}
    assert "over frames of speech alone 0.2" in topics["chance"]
    assert "skill, speech" in summary.page.read_text()


def test_finetuning_table_judges_the_training_window(built: tuple[Path, ReportSummary]) -> None:
    rows = {row["arm"]: row for row in table(built[0] / "table_finetune.csv")}
    assert tuple(rows["rvq_4"]) == FINETUNE_TABLE
    assert list(rows) == list(LEVELS)
    assert rows["no_rvq"]["caveat"] == "without text"
    assert rows["no_rvq"]["published"] == "4.1153"
    assert float(rows["rvq_4"]["train_mean"]) == pytest.approx(2.7)
    assert float(rows["rvq_4"]["valid_mean"]) == pytest.approx(3.2, abs=0.01)
    assert rows["rvq_4"]["verdict"] == "differs"
    assert float(rows["rvq_4"]["blank_rate"]) == 0.97


def test_claims_table(built: tuple[Path, ReportSummary]) -> None:
    out, summary = built
    rows = {row["claim"]: row for row in table(out / "claims.csv")}
    assert tuple(rows["C1"]) == CLAIMS_TABLE
    # both arms of 2 codebooks stay at chance, so nothing is said about the method
    assert rows["C1"]["verdict"] == rows["C2"]["verdict"] == "not testable"
    assert rows["C1"]["caveat"].startswith(
        "seeds that know anything: icsl_2cb 0 of 3, no_icsl_2cb 0 of 3; 3 needed"
    )
    assert rows["C1.3"]["verdict"] == "not testable"
    assert rows["C4"]["verdict"] == "not testable"  # two arms end without text
    assert rows["C4.4"]["verdict"] == "not testable"
    assert rows["C5"]["verdict"] == "not testable"
    assert summary.contradicted == []  # so --strict passes
    assert float(rows["C1.3"]["published"]) == pytest.approx(4.6120 - 4.6178)
    assert rows["C1.1"]["caveat"] == (
        "seeds that know anything: icsl_2cb 0 of 3; 3 needed; 3 of 6 runs end at chance or worse"
    )
    assert rows["C1.3"]["caveat"].startswith("seeds that know anything: icsl_2cb 0 of 3, no_icsl")


def test_the_page_is_whole_safe_and_private(built: tuple[Path, ReportSummary]) -> None:
    page = (built[0] / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == len(FIGURES + CODE_FIGURES)
    assert page.count("<svg") == 2 * len(FIGURES) + len(CODE_FIGURES) + 1  # similarity: published
    links = set(re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", page))
    assert links == {p.name for p in built[0].iterdir()} - {"index.html"}  # all of them, no other
    names = re.findall(r" id=\"([^\"]+)\"", page)
    assert len(names) == len(set(names))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", page)) <= set(names)
    assert "http" not in page
    assert "<img" not in page
    # a value, its seed and its update where a point is pointed at
    assert re.search(r"<title>icsl_8cb, seed 2, update 400: 4\.\d+</title>", page)
    assert "<title>rvq_4, seed 1, update" in page
    assert len(page) < 2_000_000
    assert "corrected&lt;b&gt;_mini" in page
    assert "<b>_mini" not in page
    assert "/home/" not in page
    assert "batch.json" in page
    assert str(built[0].parent) not in page
    assert "ln(101)" in page
    for run in ("pretrain/no_icsl_16cb/seed-1", "pretrain/icsl_4cb/seed-3"):
        assert run in page  # neither failed nor unfinished runs are dropped
    assert re.search(r"pretrain/icsl_16cb/seed-3</td><td>missing", page)


def test_why_says_only_what_the_logs_hold(built: tuple[Path, ReportSummary]) -> None:
    data = built[1].data
    topics = {f["topic"]: f["text"] for f in data["findings"] if f["recipe"]}
    assert topics["masking"].startswith("5.0 % of the frames")
    assert "6 of 21 finished runs end within 0.02" in topics["chance"]
    assert (
        "0.0003 with 2, 4, 8, 16 codebooks, sending 0.2 % of the codebooks' gradient"
        in topics["ICSL"]
    )
    assert "18 of 18 finished runs output blanks" in topics["blanks"]
    assert "zeroed losses" not in topics  # never logged
    assert (
        "25 % of its entries in use on validation (exp(entropy)/V of 48"
        in (topics["use of codebooks"])
    )
    assert "0.100 with ICSL and 0.100 without it" in topics["redundancy"]
    assert (
        "rvq_16 level 1 leaves a mean squared residual of 1, level 8 12 %" in (topics["RVQ levels"])
    )


def test_damaged_codes_are_said_to_be(built: tuple[Path, ReportSummary]) -> None:
    page = (built[0] / "index.html").read_text(encoding="utf-8")
    assert page.count("codes.npz can&#39;t be read") == len(LEVELS) - 1


def test_the_page_says_whether_published_differences_are_noise(
    built: tuple[Path, ReportSummary],
) -> None:
    headlines = built[1].data["headlines"]
    text = [h["text"] for h in headlines if h["recipe"] and h["topic"] == "noise"]
    # all arms but the two at chance have a spread over seeds of 0.001
    assert text[0].startswith("Is 4.6120 against 4.6178 more than noise? Yes, more")
    assert "Of the table's 3 steps" in text[0]
    assert text[1].startswith("Is 3.85 against 4.59 more than noise? Yes, more")
    alone = [h["text"] for h in headlines if not h["recipe"]]
    assert "are of one seed each" in alone[0]
    assert "4.6120 and 4.6178 are 0.0031 under and 0.0027 over chance" in alone[0]
    size = [h["text"] for h in headlines if h["topic"] == "size"]
    assert size == []  # 400 updates are no mini, and of the model nothing is known


def test_worse_than_chance_and_recognizing_nothing_are_caveats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])  # not what this is about
    write_recipe(tmp_path, "tiny", seeds=[1, 2, 3], model={"width": 64, "layers": 2})
    for seed in (1, 2, 3):
        for k, arm in enumerate(PRETRAIN_ARMS):
            loss = CHANCE + 0.05 + 0.001 * k + 1e-5 * ((k * seed) % 3)
            write_run(tmp_path, "pretrain", arm, seed, loss, points=10)
        for k, arm in enumerate(LEVELS):
            wer = 0.9 if (arm, seed) == ("rvq_1", 1) else 1.2
            write_run(tmp_path, "finetune", arm, seed, 14 + 0.1 * k + 0.01 * ((k * seed) % 3),
                      columns={"wer": wer})  # fmt: skip
    summary = build_report([tmp_path], tmp_path / "report")
    rows = table(tmp_path / "report" / "table_pretrain.csv")
    assert {row["caveat"] for row in rows} == {"worse than chance"}
    fine = {r["arm"]: r["caveat"] for r in table(tmp_path / "report" / "table_finetune.csv")}
    assert (fine["rvq_1"], fine["rvq_2"]) == ("2 of 3 WER 1 or more", "WER 1 or more")
    claims = {row["claim"]: row for row in table(tmp_path / "report" / "claims.csv")}
    assert claims["C3"]["verdict"] == "not testable"
    assert claims["C3"]["caveat"].endswith(
        "icsl_16cb 0 of 3; 3 needed; all 12 runs end at chance or worse"
    )
    assert "14 of 15 runs end without text or with a word error" in claims["C4"]["caveat"]
    assert tuple(claims["C3"]) == CLAIMS_TABLE
    page = summary.page.read_text()
    beside = (
        r"not testable</span>\s*<br><span class=\"needed\">seeds that know anything: icsl_2cb 0"
    )
    assert re.search(beside, page)
    assert "24 of 24 runs finished, 24 worse than chance" in page
    size = next(h["text"] for h in summary.data["headlines"] if h["topic"] == "size")
    assert size.startswith("Far too small to test the study: pretraining made 100 updates where")
    assert "the model has 2 layers of width 64, not 12 of 768" in size


@pytest.mark.parametrize(
    ("start", "own"),
    [("icsl_2cb/seed-{seed}", True), ("facebook/wav2vec2-base", False), (None, False)],
)
def test_whose_size_an_encoder_fine_tuned_before_has(start: str | None, own: bool) -> None:
    """That of what the first of the arms stands on; of a circle nobody's."""
    arms = {"start": {"encoder": start} if start else {}, "rvq_1": {"rvq.levels": 1}}
    recipe = {"finetune": {"encoder": "finetune/start/seed-{seed}", "arms": arms}}
    work: Any = SimpleNamespace(recipe=recipe, arms=lambda _: ["icsl_2cb"])
    assert scale._own_encoder(work, "finetune") is own
    assert scale._own_encoder(work, "pretrain")


def page_of(summary: ReportSummary) -> str:
    return summary.page.read_text(encoding="utf-8")


def test_what_repeats_is_asked_whether_differences_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs at chance: under as-run a reversed difference, under corrected no verdict; and
    neither contradicts a claim about the method."""
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    texts = {}
    badges: dict[str, str] = {}
    for name in ("as-run+mini", "corrected+mini"):
        root = tmp_path / name
        write_recipe(root, name, seeds=[1, 2, 3], finetune=["rvq_4"])
        for seed in (1, 2, 3):
            for arm in PRETRAIN_ARMS:
                size = codebooks_of(arm, {}) or 0
                loss = CHANCE + 0.0001 * size + 0.00001 * ((seed * size) % 7)
                write_run(root, "pretrain", arm, seed, loss, points=4)
        summary = build_report([root], tmp_path / "report")
        claim = next(c for c in summary.data["claims"] if c["claim"] == "C3")
        texts[name] = (claim["verdict"], re.sub(r"\s+", " ", summary.page.read_text()))
        assert summary.contradicted == []
        badges |= re.findall(r'<b>(C[13])</b>.*?class="verdict ([^"]+)">', page_of(summary), re.S)
        # where runs know nothing no number of seeds decides, and no badge looks like a verdict
        assert "to decide:" not in page_of(summary)
        assert "narrow enough from" not in page_of(summary)
        assert not re.findall(r'"verdict (?:supported|contradicted|reproduced|differs)( noted)?"',
                              page_of(summary))  # fmt: skip
        # of fine-tuning there is one line, whatever was planned
        assert "<p>No fine-tuning run yet.</p>" in page_of(summary)
        assert "<summary>No fine-tuning run yet; 6 published numbers</summary>" in page_of(summary)
        assert "<p>Nothing is measured yet of C4, C5, C9, C10, C11.</p>" in page_of(summary)
    verdict, page = texts["as-run+mini"]
    assert verdict == "contradicted"
    assert badges["C3"] == "not-testable void"
    assert 'class="verdict contradicted void">reversed</span>' in page
    assert "Published differences: " in page
    assert "reversed (C1, C3" in page
    assert "of them by runs that know nothing" in page
    assert "98.3 % interval" in page  # a part of three contradicts at 95 % for all three
    assert "Not asked of this recipe: whether a claim about the method holds" in page
    verdict, page = texts["corrected+mini"]
    assert verdict == "not testable"
    assert "Of 11 claims: none supported, none contradicted, " in page
    assert "0 of 24 pretraining runs left chance (chance less loss: " in page
    assert "Far too small to test the study" in page
    for folder in (tmp_path / "corrected+mini" / "pretrain").glob("icsl_8cb/*"):
        text = (folder / "run.json").read_text()
        record = json.loads(text)
        record["final"]["valid"]["contrastive_loss"] -= 0.5
        (folder / "run.json").write_text(json.dumps(record))
    build_report([tmp_path / "corrected+mini"], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Runs that know something (pretraining) test the claims at their own size" in page


def test_a_claim_says_which_runs_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    write_recipe(tmp_path, "gaps", seeds=range(1, 7), finetune=["rvq_4", "no_rvq"])
    for seed in range(1, 7):
        for arm in PRETRAIN_ARMS:
            if arm == "icsl_8cb" and seed > 3:
                write_run(tmp_path, "pretrain", arm, seed, float("nan"), points=4, status="failed",
                          outcome="diverged", final=False)  # fmt: skip
            elif arm == "icsl_2cb" and seed == 1:  # finished, and yet its loss can't be read
                write_run(tmp_path, "pretrain", arm, seed, float("nan"), points=4)
            elif arm != "icsl_16cb" or seed == 1:
                write_run(tmp_path, "pretrain", arm, seed, 4.4 + 0.01 * seed, points=4)
    summary = build_report([tmp_path], tmp_path / "report")
    caveats = {c["claim"]: c["caveat"] for c in summary.data["claims"]}
    both = "icsl_8cb: 3 of 6 diverged; icsl_2cb: 1 of 6 without a finite training and validation"
    assert both in caveats["C1"]
    assert "icsl_16cb: 5 of 6 missing" in caveats["C3"]
    assert "slope over 3 of 4 sizes" in caveats["C3"]
    assert "icsl_8cb" not in caveats["C2"]
    assert "rvq_2, rvq_1, rvq_8, rvq_16: not in the recipe; rvq_4: no run yet" in caveats["C4"]
    assert caveats["C5"].endswith("no run yet")  # of all its arms, which need no names
    rows = {row["arm"]: row["caveat"] for row in table(tmp_path / "report" / "table_pretrain.csv")}
    assert rows["icsl_2cb"] == "1 of 6 without a finite training and validation loss"
    assert "1 without a finite training and validation loss" in summary.page.read_text()


def test_copied_runs_are_no_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    write_recipe(tmp_path, "copies", seeds=[1, 2, 3], finetune=[])
    for arm in PRETRAIN_ARMS:
        first = write_run(tmp_path, "pretrain", arm, 1, 4.4 + 0.01 * len(arm), points=4)
        for seed in (2, 3):
            copy = shutil.copytree(first, first.with_name(f"seed-{seed}"))
            record = json.loads((copy / "run.json").read_text())
            if arm != "icsl_8cb":
                record["seed"] = seed
            (copy / "run.json").write_text(json.dumps(record))
        if arm == "icsl_8cb":  # another curve, but the record of seed 1
            text = (copy / "metrics.csv").read_text().replace(",4.", ",5.")
            (copy / "metrics.csv").write_text(text)
    summary = build_report([tmp_path], tmp_path / "report")
    rows = {row["arm"]: row for row in table(tmp_path / "report" / "table_pretrain.csv")}
    assert rows["icsl_2cb"]["caveat"] == "2 of 3 identical to another seed"
    assert rows["icsl_8cb"]["caveat"] == (
        "1 of 3 identical to another seed; 1 of 3 with the run.json of icsl_8cb/seed-1"
    )
    assert {(row["verdict"], row["seeds"]) for row in rows.values()} == {("too few seeds", "1")}
    claims = [c for c in summary.data["claims"] if c["parts"][0]["seeds"]]
    assert len(claims) == 5
    assert {c["verdict"] for c in claims} == {"too few seeds"}
    assert all("identical to another seed" in c["caveat"] for c in claims)
    assert "identical to another seed</td>" in summary.page.read_text()  # in the list of runs


def test_runs_of_a_bank_share_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    write_recipe(tmp_path, "bank", seeds=[1, 2], pretrain=["icsl_2cb"])
    for seed in (1, 2):
        write_run(tmp_path, "pretrain", "icsl_2cb", seed, 4.4, wall_seconds=3600.0)
        for k, arm in enumerate(LEVELS):
            bank = [name for name in LEVELS if name != "rvq_16"] if arm != "rvq_16" else []
            write_run(tmp_path, "finetune", arm, seed, 4.4, wall_seconds=7200.0 + k, bank=bank,
                      world_size=4)  # fmt: skip
    page = build_report([tmp_path], tmp_path / "report").page.read_text()
    # a seed: one hour of pretraining, two for the bank, two for the arm alone
    assert "<dt>wall time (of one process of 4)</dt><dd>10.0 h</dd>" in page
    # 40 points of 640 s each: three such passes a seed
    assert f"<dt>audio trained on</dt><dd>{6 * 40 * 640 / 3600:.1f} h</dd>" in page


def test_the_card_names_corpus_and_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough updates alone don't make a run large: what it was trained on and with counts too."""
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    for name, corpus, hours, width in (
        ("large", "librispeech", 10.0, 768), ("toy", "synthetic", 0.05, 64)
    ):  # fmt: skip
        root = tmp_path / name
        write_recipe(root, name, seeds=[1], model={"width": width, "layers": 12},
                     data={"corpus": corpus, "subset": "10h"})  # fmt: skip
        (root / "data").mkdir()
        subsets = {"subsets": {"10h": {"hours": hours}}}
        (root / "data" / "summary.json").write_text(json.dumps(subsets))
        write_run(root, "pretrain", "icsl_8cb", 1, CHANCE, points=72)
    summary = build_report([tmp_path / "large", tmp_path / "toy"], tmp_path / "report")
    page = summary.page.read_text()
    assert "corpus librispeech, 10 h for training" in page
    assert "corpus synthetic, 0.05 h for training" in page
    sizes = {h["recipe"]: h["text"] for h in summary.data["headlines"] if h["topic"] == "size"}
    assert list(sizes) == ["toy"]
    for reason in ("of width 64, not 12 of 768", "synthetic, not speech", "0.05 h of training"):
        assert reason in sizes["toy"]
    small = {c["recipe"] for c in summary.data["claims"] if "far too small" in c["caveat"]}
    assert small == {"toy"}
    (tmp_path / "toy" / "data" / "summary.json").write_text("[")
    assert build_report([tmp_path / "toy"], tmp_path / "report")


def test_places_on_the_machine_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    write_recipe(tmp_path, "/srv/jane doe/mine", seeds=[1],
                 data={"root": "/srv/jane/corpus", "download_url": "https://mirror.internal/x",
                       "train_parts": ["/srv/jane/parts/one"]})  # fmt: skip
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["finetune"] |= {"encoder": "/srv/jane/models/base", "log_every": 7}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_run(tmp_path, "pretrain", "icsl_8cb", 1, 4.4, status="failed", device="/dev/jane/gpu",
              reason="nan at /srv/jane doe/runs of mine/batch.json, see there")  # fmt: skip
    summary = build_report([tmp_path], tmp_path / "report")
    for path in (tmp_path / "report").iterdir():
        text = path.read_text()
        assert not re.search(r"jane|/srv|mirror|internal", text), path.name
    page = summary.page.read_text()
    assert re.search(r"finetune\.encoder</td><td[^>]*>[^<]*</td><td[^>]*>base</td>", page)
    assert "nan at batch.json, see there" in page
    # the number of fine-tuning is the mean of the last window: its length is no detail
    assert re.search(r"finetune\.log_every</td><td[^>]*>10</td><td[^>]*>7</td>", page)


def test_answers_and_verdicts_come_before_what_verdicts_mean(
    built: tuple[Path, ReportSummary],
) -> None:
    page = re.sub(r"\s+", " ", (built[0] / "index.html").read_text())
    places = [
        page.index(text)
        for text in ('id="answers"', 'id="verdicts"', "<b>C1</b>", 'id="reading"', 'id="claims"')
    ]
    assert places == sorted(places)
    told = page[places[3] :]
    told = told[: told.index("</details>")]
    for word in ("reproduced", "margin", "differs", "inconclusive", "too few", "caveat"):
        assert f"<b>{word}</b>" in told, word
    assert "each number still differs in 5 % of cases, and at least one of its 14 in 51 %" in told
    assert "at least one of the 11 in about 25 %" in told


def test_a_diverged_run_leaves_the_axis_to_the_others(tmp_path: Path) -> None:
    write_recipe(tmp_path, "boom", seeds=[1, 2], pretrain=["icsl_8cb"], finetune=[])
    write_run(tmp_path, "pretrain", "icsl_8cb", 1, 4.4)
    failed = write_run(tmp_path, "pretrain", "icsl_8cb", 2, 4.4, status="failed",
                       outcome="diverged", final=False)  # fmt: skip
    lines = (failed / "metrics.csv").read_text().splitlines()
    for k, line in enumerate(lines[20:], 20):
        cells = line.split(",")
        lines[k] = ",".join([*cells[:2], str(4.4 * 2.0 ** (k - 19)), *cells[3:]])
    (failed / "metrics.csv").write_text("\n".join(lines) + "\n")
    plans = {plan.name: plan for plan in figures._paper(load_published())}
    axes = figures.lay_out([read_work(tmp_path)], plans["fig2_pretrain_train"]).panels[1].axes
    low, high = axes.get_ylim()
    assert 4.3 < low < 4.4 < CHANCE < high < 4.7
    edge = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata()) == 1]
    assert [line.get_ydata()[0] for line in edge] == [high]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["unfinished or failed run", "where it leaves the axis"]
    shutil.rmtree(tmp_path / "pretrain" / "icsl_8cb" / "seed-1")
    axes = figures.lay_out([read_work(tmp_path)], plans["fig2_pretrain_train"]).panels[1].axes
    assert axes.get_ylim()[1] < 4.7  # nor alone


@pytest.mark.parametrize("last", [3.0, 0.3, 0.04, 0.003, 1e-6])
def test_labels_of_a_loss_axis_do_not_touch_however_wide(tmp_path: Path, last: float) -> None:
    write_recipe(tmp_path, "deep", seeds=[1], pretrain=[], finetune=["rvq_4"])
    run = write_run(tmp_path, "finetune", "rvq_4", 1, 4.0)
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("ctc_loss")
    losses = np.geomspace(12.0, last, len(lines))
    for k, line in enumerate(lines):
        cells = line.split(",")
        cells[column] = str(losses[k])
        lines[k] = ",".join(cells)
    (run / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    plans = {plan.name: plan for plan in figures._paper(load_published())}
    sheet = figures.lay_out([read_work(tmp_path)], plans["fig5_finetune_train"])
    axes = sheet.panels[1].axes
    sheet.figure.canvas.draw()
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert low < 1.5 * last
    boxes = sorted(
        (label.get_window_extent() for label in axes.get_yticklabels()
         if low <= label.get_position()[1] <= high),
        key=lambda box: box.y0,
    )  # fmt: skip
    assert len(boxes) >= 3
    assert all(under.y1 <= over.y0 for under, over in pairwise(boxes))


def test_runs_of_different_data_are_not_taken_for_one_experiment(tmp_path: Path) -> None:
    write_recipe(tmp_path, "mixed", seeds=[1, 2], finetune=["rvq_4"], pretrain=["icsl_2cb"])
    for seed in (1, 2):
        write_run(tmp_path, "pretrain", "icsl_2cb", seed, 4.4, manifest_sha256=f"{seed}" * 64,
                  settings={"pretrain": {"updates": 10}})  # fmt: skip
        settings = {"encoder_sha256": f"{seed}", "finetune": {"updates": 10 * seed}}
        write_run(tmp_path, "finetune", "rvq_4", seed, 4.4, settings=settings)
    work = read_work(tmp_path)
    assert caveat(work, "pretrain", "icsl_2cb") == "runs of 2 different data sets"
    assert caveat(work, "finetune", "rvq_4") == "runs of 2 different recipes"


def test_folders_of_one_recipe_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        write_recipe(folder, "same")
    names = [work.name for work in named_apart([read_work(f) for f in folders], folders)]
    assert names == ["same (first)", "same (second)"]
    alike = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    works = [read_work(folder) for folder in folders]
    assert [w.name for w in named_apart(works, alike)] == ["same (run) (1)", "same (run) (2)"]
    taken = [*works, replace(works[0], name="same (run)")]
    names = [w.name for w in named_apart(taken, [*folders, tmp_path])]
    assert len(set(names)) == 3


def test_folders_alike_in_recipe_and_name_keep_their_own_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])
    for sign, folder in ((-1, tmp_path / "a" / "run"), (1, tmp_path / "b" / "run")):
        write_recipe(folder, "same", seeds=[1, 2, 3])
        for seed in (1, 2, 3):
            for arm in PRETRAIN_ARMS:
                loss = 4.4 + 0.01 * sign * (arm == "icsl_8cb") + 0.0001 * seed
                write_run(folder, "pretrain", arm, seed, loss, points=4)
    works = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    summary = build_report(works, tmp_path / "report")
    verdicts = {c["recipe"]: c["verdict"] for c in summary.data["claims"] if c["claim"] == "C1"}
    assert verdicts == {"same (run) (1)": "supported", "same (run) (2)": "contradicted"}
    page = summary.page.read_text()
    row = page[page.index("<b>C1</b>") : page.index("<b>C2</b>")]
    assert re.findall(r"class=\"verdict ([a-z]+)", row) == ["supported", "contradicted"]
    assert page.count("<h4>same (run) (1)</h4>") == 2  # one table of each stage
    (tmp_path / "link").symlink_to(works[0])
    with pytest.raises(UsageError, match="given twice"):
        build_report([works[0], tmp_path / "link"], tmp_path / "report")


def test_latex(built: tuple[Path, ReportSummary]) -> None:
    text = (built[0] / "table_pretrain.tex").read_text()
    assert "\\textit{corrected<b>\\_mini}} \\\\\n" in text
    assert "\nicsl\\_8cb & 8 & yes & 4.6120" in text
    assert "\\begin{tabular}{lrlrlrrrl}" in text


def test_a_copied_folder_and_two_side_by_side(
    built: tuple[Path, ReportSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "draw_all", lambda *_: [])  # see below
    copied = tmp_path / "copied"
    shutil.copytree(built[0].parent, copied)
    shutil.rmtree(copied / "report")
    other = tmp_path / "other"
    write_recipe(other, "as-run", seeds=[1], pretrain=["mine_3cb"], finetune=["rvq_4"])
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe |= {"data": {"root": "/data/x", "subset": "1h"}}
    recipe["pretrain"]["arms"]["mine_3cb"] = {"quantizer.codebooks": 3, "icsl.weight": 0.0}
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_run(other, "pretrain", "mine_3cb", 1, 4.5)
    page = build_report([copied, other], tmp_path / "report").page.read_text()
    assert re.search(r"data\.subset</td><td[^>]*>10h</td><td[^>]*>1h</td>", page)
    assert "data.root" not in page
    rows = table(tmp_path / "report" / "table_pretrain.csv")
    assert [r for r in rows if r["recipe"] != "as-run"] == table(built[0] / "table_pretrain.csv")
    mine = next(row for row in rows if row["arm"] == "mine_3cb")
    assert (mine["recipe"], mine["codebooks"], mine["icsl"]) == ("as-run", "3", "no")
    assert (mine["published"], mine["verdict"], mine["mean"]) == ("", "", "4.5000")
    unplanned = next(r for r in rows if (r["recipe"], r["arm"]) == ("as-run", "icsl_8cb"))
    assert (unplanned["verdict"], unplanned["caveat"]) == ("not measured", "not in the recipe")
    fine = table(tmp_path / "report" / "table_finetune.csv")
    planned = next(r for r in fine if (r["recipe"], r["arm"]) == ("as-run", "rvq_4"))
    assert (planned["verdict"], planned["caveat"]) == ("not measured", "no run yet")


@pytest.mark.parametrize(("works", "shape"), [(1, (1, 2)), (3, (2, 2)), (4, (2, 3))])
def test_figures_of_several_recipes(
    built: tuple[Path, ReportSummary], works: int, shape: tuple[int, int]
) -> None:
    work = read_work(built[0].parent)
    names = [f"recipe {k} " + "with a long name " * k for k in range(works)]
    plan = next(plan for plan in figures._paper(load_published()) if plan.name == "fig4_codebooks")
    sheet = figures.lay_out([replace(work, name=name) for name in names], plan)
    figure, shown = sheet.figure, [panel.axes for panel in sheet.panels]
    places = [(round(cell.y0, 6), round(cell.x0, 6)) for cell in sheet.cells]
    assert tuple(len({place[k] for place in places}) for k in (0, 1)) == shape
    titles = [axes.get_title().replace("\n", " ") for axes in shown]
    assert titles == ["published", *(f"measured: {name}".strip() for name in names)]
    figure.draw_without_rendering()
    for axes, cell in zip(shown, sheet.cells):  # labels, ticks and titles stay in their cell
        box, frame = axes.get_tightbbox(), cell.transformed(figure.dpi_scale_trans)
        assert box is not None
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


def test_every_seed_is_drawn_and_every_line_named(tmp_path: Path) -> None:
    write_recipe(tmp_path, "seeds", seeds=[1, 2, 3], finetune=[])
    for arm in PRETRAIN_ARMS[:6]:
        for seed in (1, 2, 3)[: 1 if arm == "icsl_8cb" else 3]:
            write_run(tmp_path, "pretrain", arm, seed, 4.4)
    plans = {plan.name: plan for plan in figures._paper(load_published())}
    work = read_work(tmp_path)
    sheet = figures.lay_out([work], plans["fig2_pretrain_train"])
    paper, measured = sheet.panels
    assert (paper.several, measured.several) == (False, True)
    thin = [line for line in measured.axes.lines if line.get_linewidth() < 1]
    assert len(thin) == 3 * 3  # of one seed there is no other line
    arms = {"no_icsl_2cb", "icsl_2cb", "no_icsl_8cb", "icsl_8cb"}
    named = {text.get_text().replace("\n", " ") for text in measured.axes.texts if text.get_text()}
    assert named == {*arms, "chance, logged"}
    places = sorted(t.get_position()[1] for t in measured.axes.texts if t.get_text())
    assert min(b - a for a, b in pairwise(places)) > 0.06  # although all end at 4.4
    assert measured.axes.get_legend() is None
    figure4 = figures.lay_out([work], plans["fig4_codebooks"]).panels[1]
    ranges = [line for line in figure4.axes.lines if len(set(line.get_xdata())) == 1
              and len(line.get_xdata()) == 2]  # fmt: skip
    assert len(ranges) == 5  # and of one seed no range
    marks = [title for _, _, title in figure4.points if title.startswith("with ICSL, 8 codebooks")]
    assert marks == ["with ICSL, 8 codebooks, seed 1: 4.4"]


def test_what_is_not_measured_takes_no_panel_and_no_words(tmp_path: Path) -> None:
    write_recipe(tmp_path, "half", seeds=[1])
    write_run(tmp_path, "pretrain", "icsl_8cb", 1, 4.4)
    summary = build_report([tmp_path], tmp_path / "report")
    page = summary.page.read_text()
    unmeasured = page[page.index("Published alone, nothing measured yet: Figure 5.") :]
    unmeasured = unmeasured[: unmeasured.index("</details>")]
    assert unmeasured.count("<figure>") == unmeasured.count("<svg") == 3
    assert "measured: half" not in unmeasured
    for words in ("mean", "Measured panels", "range"):
        assert words not in re.sub(r"<svg.*?</svg>", "", unmeasured).replace("are means of", "")
    # one seed: nothing is a mean of seeds
    assert "Thin lines are seeds" not in page


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published")
    build_report([], out, published_only=True)
    return out


def test_published_alone(published: Path) -> None:
    rows = table(published / "table_pretrain.csv")
    assert {row["verdict"] for row in rows} == {"not measured"}
    assert [row["published"] for row in rows if row["arm"] == "icsl_8cb"] == ["4.6120"]
    assert "nothing is measured on this page" in (published / "index.html").read_text()


def test_a_second_build_gives_the_same_bytes(published: Path, tmp_path: Path) -> None:
    build_report([], tmp_path, published_only=True)
    for path in published.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_committed_tables_are_what_is_built(published: Path) -> None:
    for path in published.iterdir():
        if path.suffix in (".csv", ".md", ".tex"):
            committed = shipped("results", "published", path.name)
            assert committed.read_text() == path.read_text(), path.name


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        build_report([], tmp_path)
    with pytest.raises(UsageError):
        build_report([tmp_path], tmp_path, published_only=True)
    with pytest.raises(DataError, match="no such work folder"):
        build_report([tmp_path / "none"], tmp_path / "report")


def test_no_torch() -> None:
    code = "import sys, reproduce.report; assert not {'torch', 'pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("see /home/me/x.json now", "see x.json now"),
        ("'/data/a b.wav'", "'a b.wav'"),
        ("C:\\Users\\me\\x", "x"),
        ("~/runs/x", "x"),
        ("1/2 and rvq/seed-1", "1/2 and rvq/seed-1"),
        ("nan at /home/Jane Doe/my runs/b.json, then 3/4", "nan at b.json, then 3/4"),
        ("found /a/b.txt. Use runs/x", "found b.txt. Use runs/x"),
        ("https://mirror.example.org/secret/x.tar", "x.tar"),
        ("s3://bucket/a/b", "b"),
        ("exp(entropy)/V, 3 / 4 a/b", "exp(entropy)/V, 3 / 4 a/b"),
        ("\\\\server\\share\\x", "x"),
    ],
)
def test_paths_are_cut(text: str, private: str) -> None:
    assert without_paths(text) == private


def test_nothing_else_is_cut(published: Path) -> None:
    """What is published holds no path, so the page shows it whole."""
    cells = [cell for p in shipped("results", "published", "data").glob("*.csv")
             for row in csv.reader(p.open(encoding="utf-8")) for cell in row]  # fmt: skip
    captions = [plan.caption for plan in figures._paper(load_published())]
    source = Path(figures.__file__).read_text(encoding="utf-8")
    for text in (*cells, *captions, *re.findall(r'"([^"]+)"', source)):
        assert without_paths(text) == text


@pytest.mark.slow
def test_a_hundred_runs_of_two_thousand_points(tmp_path: Path) -> None:
    seeds = range(7)
    write_recipe(tmp_path, seeds=seeds)
    for seed in seeds:
        for arm in PRETRAIN_ARMS:
            run = write_run(tmp_path, "pretrain", arm, seed, 4.4, points=1600)
            write_codes(run, rows=codebooks_of(arm, {}) or 0)
        for arm, levels in LEVELS.items():
            run = write_run(tmp_path, "finetune", arm, seed, 3.4, points=1600)
            if levels:
                write_codes(run, rows=levels, entries=256)
    began = time.process_time()
    summary = build_report([tmp_path], tmp_path / "report")
    assert time.process_time() - began < 16  # 8 beside other processes
    assert sum(row["judged"]["seeds"] for row in summary.data["table_pretrain"]) == 8 * len(seeds)
