"""``check``: whether what a recipe names is on this machine."""

from __future__ import annotations

from reproduce.errors import DataError, UsageError, W2vrepError
from reproduce.recipe.schema import Recipe
from reproduce.tasks.corpus import require_corpus
from reproduce.tasks.encoders import missing_encoders


def require_on_disk(recipe: Recipe) -> None:
    """Find all of a recipe that isn't on this machine. Hub names and bundles are fetched when they
    are used: nothing is asked of the network.

    Raises:
        UsageError: no folder is named for the corpus.
        DataError: something else is missing; both name all there is.
    """
    found: list[W2vrepError] = []
    try:
        require_corpus(recipe)
    except W2vrepError as error:
        found.append(error)
    found += missing_encoders(recipe)
    if len(found) == 1:
        raise found[0]
    if found:
        kind = next((UsageError for e in found if isinstance(e, UsageError)), DataError)
        lines = "".join(f"\n  {error.where}: {error.found}" for error in found)
        advice = "\n  ".join(dict.fromkeys(error.do for error in found))
        raise kind(
            f"{len(found)} things that it names aren't here{lines}", where=recipe.name, do=advice
        )
