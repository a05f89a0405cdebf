"""prepare: corpus to manifest, nested subsets, packed audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reproduce.data.corpora import Corpus, read_corpus
from reproduce.data.manifest import write_manifest
from reproduce.data.summary import Summary
from reproduce.errors import UsageError
from reproduce.recipe.load import as_yaml
from reproduce.recipe.schema import Recipe
from reproduce.records import WorkFolder, write_text


def corpus_of(recipe: Recipe) -> Corpus:
    """The recipe's corpus with its options; nothing is read yet."""
    data = recipe.data
    options: dict[str, Any] = {
        "root": Path(data.root) if data.root is not None else None,
        "train_parts": data.train_parts,
        "valid_parts": data.valid_parts,
        "test_parts": data.test_parts,
        "transcripts": Path(data.transcripts) if data.transcripts is not None else None,
        "valid_fraction": data.valid_fraction,
    }
    if data.corpus == "synthetic":
        options["synthetic"] = data.synthetic.model_dump()
    elif data.root is None:
        raise UsageError(
            f"corpus {data.corpus} needs a folder",
            where="data.root",
            do=f"give --set data.root=/path/to/{data.corpus}",
        )
    return read_corpus(data.corpus, **options)


def prepare(recipe: Recipe, work: WorkFolder) -> Summary:
    """Make ``data/`` of a work folder; does nothing where it is there already.

    Raises:
        DataError: the corpus can't be read or holds no good utterance.
    """
    corpus = corpus_of(recipe)
    save_recipe(recipe, work)
    options = recipe.prepare_settings()
    for path in ("root", "transcripts"):  # where things lie on this machine is nobody's business
        if options[path] is not None:
            options[path] = Path(options[path]).name
    return write_manifest(
        corpus,
        work.data,
        corpus=recipe.data.corpus,
        options=options,
        subset_seed=recipe.data.subset_seed,
        jobs=recipe.data.jobs,
        progress=True,
    )


def save_recipe(recipe: Recipe, work: WorkFolder) -> None:
    """``recipe.yaml``: resolved, as used, without the paths of this machine."""
    data = recipe.data.model_copy(
        update={
            name: Path(value).name if value is not None else None
            for name, value in (
                ("root", recipe.data.root),
                ("transcripts", recipe.data.transcripts),
            )
        }
    )
    write_text(work.recipe, as_yaml(recipe.model_copy(update={"data": data})))


def summary_lines(summary: Summary) -> list[str]:
    """What a user wants to know after preparing."""
    lines = []
    for split, hours in summary.hours.items():
        count = summary.utterances[split]
        if not count:
            continue
        speakers = len(summary.speakers[split])
        lines.append(f"{split}: {count} utterances, {hours:.2f} h, {speakers} speakers")
    lines += [f"warning: {text}" for text in summary.warnings]
    if summary.rejected:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in summary.reasons().items())
        lines.append(
            f"rejected: {len(summary.rejected)} ({reasons}); each is named in data/summary.json"
        )
    return lines
