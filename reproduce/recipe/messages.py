"""What is wrong with a recipe, said in its own words: dotted paths, values found, nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_MESSAGES = {
    "model_type": "should be a section with keys",
    "list_type": "should be a list in brackets",
    "string_type": "should be text, in quotes",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
}


def validation_messages(
    error: ValidationError, tree: Mapping[str, Any], model: type[BaseModel]
) -> Iterator[tuple[list[str], str]]:
    """(keys, message) of each error in ``tree``; the branches of a union become one message."""
    found: dict[tuple[str, ...], list[str]] = {}
    inputs: dict[tuple[str, ...], str] = {}
    for item in error.errors():
        keys = tuple(_real_path(item["loc"], tree))
        if item["type"] == "extra_forbidden":
            found[keys] = [f"unknown key{near_key(keys, model)}"]
            continue
        message = item["msg"][:1].lower() + item["msg"][1:]
        message = _MESSAGES.get(item["type"], message.removeprefix("input "))
        found.setdefault(keys, []).append(message)
        inputs[keys] = shown(item["input"])
    for keys, messages in found.items():
        first, *others = dict.fromkeys(messages)
        text = " or ".join([first, *(other.removeprefix("should be ") for other in others)])
        yield list(keys), f"{text}, found {inputs[keys]}" if keys in inputs else text


def shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return "a mapping"
    return "nothing" if value is None else repr(value)


def _real_path(loc: tuple[int | str, ...], tree: Any) -> list[str]:
    """The part of an error's location that exists in the input (union branches don't)."""
    keys: list[str] = []
    for part in loc:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            break
        keys.append(str(part))
    return keys or [str(loc[0])]


def near_key(keys: Sequence[str], model: type[BaseModel]) -> str:
    """A hint: the nearest name in the same section, else one that exists elsewhere."""
    paths = known_paths(model)
    parent = ".".join(keys[:-1])
    beside = [path for path in paths if path.rpartition(".")[0] == parent]
    within = [path for path in paths if path.startswith(f"{keys[0]}.")]
    for candidates, likeness in ((beside, 0.6), (within, 0.7), (paths, 0.8)):
        names = {path.rpartition(".")[2]: path for path in reversed(candidates)}
        if near := difflib.get_close_matches(keys[-1], names, n=1, cutoff=likeness):
            return f"; did you mean {names[near[0]]}?"
    return ""


def known_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a section."""
    paths = []
    for name, info in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            paths += known_paths(info.annotation, f"{prefix}{name}.")
    return paths


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint: the nearest of some names, or the first that ends alike."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        last = name.split(".")[-1]
        near = [path for path in names if path.split(".")[-1] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""
