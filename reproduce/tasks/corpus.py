"""What a recipe's corpus is: options for its reader, whether it is there, its size before work, the
recipe as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reproduce.data.audio import BYTES_PER_SAMPLE
from reproduce.data.corpora import obtainable_corpus, read_corpus
from reproduce.data.disk import free_bytes, size, writing
from reproduce.data.estimate import estimate
from reproduce.data.summary import Summary
from reproduce.errors import DataError, MissingCorpusError, UsageError, W2vrepError
from reproduce.recipe.dump import as_yaml
from reproduce.recipe.schema import Cluster, Recipe
from reproduce.records import WorkFolder, write_text


def corpus_options(recipe: Recipe) -> dict[str, Any]:
    """What corpora may want to know; each takes what it needs.

    Raises:
        DataError: a path isn't UTF-8.
    """
    data = recipe.data
    for key, value in (("root", data.root), ("transcripts", data.transcripts)):
        shown = str(value or "").encode("utf-8", "backslashreplace").decode()
        if value is not None and shown != value:
            raise DataError(
                f"the path {shown} isn't UTF-8", where=f"data.{key}", do="rename the folder or file"
            )
    options: dict[str, Any] = {
        "root": Path(data.root) if data.root is not None else None,
        "train_parts": data.train_parts,
        "valid_parts": data.valid_parts,
        "test_parts": data.test_parts,
        "transcripts": Path(data.transcripts) if data.transcripts is not None else None,
        "valid_fraction": data.valid_fraction,
        "download": data.download,
        "download_url": data.download_url,
        "archives_sha256": data.archives_sha256,
    }
    if data.corpus == "synthetic":
        options["synthetic"] = data.synthetic.model_dump()
    return options


def require_corpus(recipe: Recipe, work: WorkFolder | None = None) -> None:
    """Find what is wrong with where the corpus lies, and with its table, before anything is begun.

    Reads as much as its first utterance takes; no audio.

    Args:
        work: what was prepared there before may stand in for a corpus that is gone.

    Raises:
        UsageError: it lies in a folder, and none is named.
        DataError: it isn't there, or can't be listed.
    """
    options = corpus_options(recipe)
    try:
        next(iter(read_corpus(recipe.data.corpus, **options)), None)
    except MissingCorpusError as error:
        prepared = work is not None and work.summary.exists()
        if not (prepared or obtainable_corpus(recipe.data.corpus, **options)):
            raise missing_corpus(recipe, error) from None


def missing_corpus(recipe: Recipe, error: MissingCorpusError) -> W2vrepError:
    """The error, or the key to set where none names a folder."""
    if recipe.data.root is not None:
        return error
    corpus = recipe.data.corpus
    return UsageError(
        f"corpus {corpus} needs a folder",
        where="data.root",
        do=f"give --set data.root=/path/to/{corpus}",
    )


def size_line(recipe: Recipe, work: WorkFolder) -> str:
    """How large ``data/`` is or will be."""
    free = f"{size(free_bytes(work.root))} free"
    try:
        if work.summary.exists():
            summary = Summary.read(work.summary)
            hours = sum(summary.hours.values())
            return f"{hours:.2f} h prepared, {size(summary.samples * BYTES_PER_SAMPLE)} of audio"
        options = corpus_options(recipe)
        about = estimate(read_corpus(recipe.data.corpus, **options), options)
    except DataError as error:
        return f"not known, {error.where}: {error.found}"
    count = f" in {about.utterances} utterances" if about.utterances is not None else ""
    return f"about {about.hours:.2f} h{count}: data/ will take {size(about.bytes)}, {free}"


def save_recipe(recipe: Recipe, work: WorkFolder) -> None:
    """``recipe.yaml``: resolved, as used, without what is this machine's or cluster's own."""
    data = recipe.data.model_copy(
        update={
            name: Path(value).name if value is not None else None
            for name, value in (
                ("root", recipe.data.root),
                ("transcripts", recipe.data.transcripts),
            )
        }
    )
    with writing(work.root):
        everywhere = recipe.model_copy(update={"data": data, "cluster": Cluster()})
        write_text(work.recipe, as_yaml(everywhere))
