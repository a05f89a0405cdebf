"""prepare: corpus to manifest, nested subsets, packed audio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from reproduce.data.corpora import Corpus, provide_corpus, read_corpus
from reproduce.data.disk import require_space, writing
from reproduce.data.estimate import estimate
from reproduce.data.figure import FIGURE, draw_corpus
from reproduce.data.manifest import Manifest, kept_without_corpus, write_manifest
from reproduce.data.summary import Summary
from reproduce.errors import MissingCorpusError
from reproduce.recipe.schema import Recipe
from reproduce.records import WorkFolder
from reproduce.tasks.corpus import corpus_options, missing_corpus, save_recipe


def prepare(recipe: Recipe, work: WorkFolder) -> Summary:
    """Make ``data/`` of a work folder; does nothing where it is there already.

    Where the corpus is gone, what was prepared from it with the same options is kept, with a
    warning, after every byte of it is checked.

    Raises:
        DataError: the corpus can't be read or holds no good utterance, there is no room for it, or
            its training subset isn't the one that the recipe requires, or validation shares audio
            with it and the recipe doesn't allow that.
    """
    data = recipe.data
    options = corpus_options(recipe)
    corpus = read_corpus(data.corpus, **options)
    save_recipe(recipe, work)
    settings = recipe.prepare_settings()
    for path in ("root", "transcripts"):  # where things lie on this machine is nobody's business
        if settings[path] is not None:
            settings[path] = Path(settings[path]).name

    def write() -> Summary:
        return write_manifest(
            corpus,
            work.data,
            corpus=data.corpus,
            options=settings,
            subset_seed=data.subset_seed,
            jobs=data.jobs,
            progress=True,
            check_room=lambda: _require_room(corpus, options, work),
        )

    try:
        summary = write()
    except MissingCorpusError as error:
        kept = kept_without_corpus(work.data, settings, data.subset_seed)
        if kept is not None:
            warning = (
                f"{error.where}: {error.found}; going on with what was prepared from it before, "
                "whole and with the same options; whether the corpus has changed can't be told"
            )
            summary = replace(kept, warnings=[warning, *kept.warnings])
        elif provide_corpus(data.corpus, **options):
            summary = write()
        elif data.root is not None and work.summary.exists():
            do = f"{error.do}; {work.data} can't stand in: made with other options, or not whole"
            raise MissingCorpusError(error.found, where=error.where, do=do) from None
        else:
            raise missing_corpus(recipe, error) from None
    summary.require_subset(data.subset, data.subset_sha256)
    if not data.allow_overlap:
        Manifest.read(work.data).require_apart()
    if summary.outcome != "there already" or not (work.data / FIGURE).exists():
        with writing(work.data):
            draw_corpus(work.data)
    return summary


def _require_room(corpus: Corpus, options: dict[str, Any], work: WorkFolder) -> None:
    """What an interrupted call has packed needs no more room; what is made anew lies beside the old
    until it is whole."""
    packed = (work.data / ".partial" / "data").glob("audio*.pcm")
    there = sum(path.stat().st_size for path in packed)
    needed = 0.9 * estimate(corpus, options).bytes - there  # it is an estimate
    require_space(work.data, round(needed), "packed audio")


def summary_lines(summary: Summary) -> list[str]:
    """What a user wants to know after preparing: a small table, and what to be wary of."""
    lines = [
        {
            "made": "prepared:",
            "made anew": "prepared anew, for the corpus, the data options or data/ itself changed:",
        }.get(summary.outcome, "prepared already, nothing to do:"),
        "             utterances     hours  speakers  shortest    median   longest",
    ]
    for split, hours in summary.hours.items():
        if count := summary.utterances[split]:
            lengths = summary.lengths[split]
            seconds = "".join(
                f"{lengths[name]:8.2f} s" for name in ("shortest", "median", "longest")
            )
            speakers = len(summary.speakers[split]) or "-"  # unknown
            lines.append(f"{split:12} {count:10} {hours:9.2f} {speakers:>9}{seconds}")
    for name, subset in summary.subsets.items():
        if subset["utterances"] and name != "all":
            lines.append(
                f"train, {name:5} {subset['utterances']:10} {subset['hours']:9.2f}"
                f"  sha256 {subset['sha256']}"
            )
        if subset["utterances"] == summary.utterances["train"]:
            break  # the larger ones are the same
    lines += [f"warning: {text}" for text in summary.warnings]
    reasons = ", ".join(f"{count} x {reason}" for reason, count in summary.reasons().items())
    where = f" ({reasons}); each is named in data/summary.json" if reasons else ""
    return [*lines, f"rejected: {len(summary.rejected)}{where}"]
