"""Layers and ``--set`` to a Recipe; shipped recipes; every problem at once."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from reproduce.errors import RecipeError, UsageError
from reproduce.recipe.checks import combination_problems
from reproduce.recipe.schema import Recipe, Section
from reproduce.shipped import shipped

GRIDS = ("pretrain", "finetune")
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (YAML 1.2), as every user of a recipe expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Layer:
    """One recipe file (or the ``--set`` options) as a tree, and what to call it in messages."""

    label: str
    tree: Tree
    name: str


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def load_recipe(spec: str, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of ``a+b+./mine.yaml`` with ``--set a.b=value`` laid over it.

    Raises:
        UsageError: no such recipe, or a ``--set`` that isn't ``key=value``.
        RecipeError: every problem found, each with its dotted path and the nearest valid name.
    """
    layers = list(_expand(_split(spec), seen=[]))
    layers += [_set_layer(text) for text in sets]
    merged = _Merge()
    for layer in layers:
        merged.lay(layer)
    named = [layer.tree["name"] for layer in layers if isinstance(layer.tree.get("name"), str)]
    merged.tree["name"] = named[-1] if named else "+".join(_stem(part) for part in _split(spec))
    return _validate(merged, spec)


def as_yaml(recipe: Recipe, *, sources: bool = True) -> str:
    """The resolved recipe as YAML, every default filled in, the source of each key beside it."""
    lines: list[str] = []
    _write(recipe, 0, lines, sources)
    return "\n".join(lines) + "\n"


def json_schema() -> Tree:
    """JSON Schema of a recipe file: what editors complete and check against.

    A file may leave out anything, name what it extends, and select arms by a list of names.
    """
    schema = Recipe.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        arms = definition["properties"].get("arms")
        if arms is not None:
            names = {"type": "array", "items": {"type": "string"}}
            mapping = {
                "type": "object",
                "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}]},
            }
            kept = {k: v for k, v in arms.items() if k not in ("type", "additionalProperties")}
            definition["properties"]["arms"] = kept | {"anyOf": [mapping, names]}
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema["properties"] |= {
        "extends": text | {"description": "recipes laid below this one, always"},
        "protocol": text | {"description": "recipes laid below this one if nothing else is"},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# ------------------------------------------------------------------------------------------ layers


def _split(spec: str) -> list[str]:
    if Path(spec).is_file():
        return [spec]
    parts = [part.strip() for part in spec.split("+")]
    if not all(parts):
        raise UsageError(f"an empty name in recipe {spec!r}", do="join names by +, as in a+b")
    return parts


def _stem(part: str) -> str:
    return Path(part).stem if part.endswith((".yaml", ".yml")) else part


def _expand(parts: Iterable[str], seen: list[str]) -> Iterator[Layer]:
    """Layers in order; a layer is laid once.

    ``extends`` names what a layer's differences are relative to: it is laid first, always.
    ``protocol`` names what a size stands on when nothing else lies below it.
    """
    for part in parts:
        path = _find(part)
        identity = str(path.resolve())
        if identity in seen:
            continue
        tree = _read(path, part)
        below = {name: tree.pop(name, None) for name in ("protocol", "extends")}
        for name, value in below.items():
            if value is not None and not isinstance(value, str):
                raise RecipeError(
                    [f"{name}: should be a recipe's name, found {value!r}"], where=part
                )
        alone = not seen
        seen.append(identity)
        if alone and below["protocol"]:
            yield from _expand(_split(below["protocol"]), seen)
        if below["extends"]:
            yield from _expand(_split(below["extends"]), seen)
        yield Layer(part, tree, _stem(part))


def _find(part: str) -> Path:
    known = shipped_recipes()
    if part in known:
        return known[part]
    path = Path(part)
    if path.is_file():
        return path
    near = difflib.get_close_matches(part, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"no recipe {part!r}",
        do=f"{hint}shipped recipes: {', '.join(known)}; or give the path of a YAML file",
    )


def _read(path: Path, label: str) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError([f"{place}{problem}"], where=label) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the recipe: {error}", where=label) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError([f"a recipe is a mapping, found {type(tree).__name__}"], where=label)
    return tree


def _set_layer(text: str) -> Layer:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text!r} isn't key=value", do="as in --set pretrain.updates=100")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        parsed = value
    keys = path.strip().split(".")
    # everything behind an arm's name is one dotted key of that arm
    if len(keys) > 3 and keys[0] in GRIDS and keys[1] == "arms":
        keys = [*keys[:3], ".".join(keys[3:])]
    tree: Any = parsed
    for part in reversed(keys):
        tree = {part: tree}
    return Layer(f"--set {text}", tree, "")


@dataclass
class _Merge:
    """Layers laid over each other, and which layer each value came from."""

    tree: Tree = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = Recipe().model_dump()

    def lay(self, layer: Layer) -> None:
        self._lay(self.tree, layer.tree, "", layer.label)

    def _lay(self, under: Tree, over: Tree, prefix: str, label: str) -> None:
        for name, value in over.items():
            path = f"{prefix}{name}"
            if path in ("pretrain.arms", "finetune.arms"):
                under[name] = self._arms(under.get(name) or {}, value, path, label)
            elif isinstance(value, dict) and isinstance(under.get(name, {}), dict):
                self._lay(under.setdefault(name, {}), value, f"{path}.", label)
            elif value is None and isinstance(under.get(name), dict):
                continue  # an empty section says nothing
            else:
                under[name] = value
                self.origin[path] = label

    def _arms(self, under: Tree, value: Any, path: str, label: str) -> Tree:
        """A mapping adds to the arms below (null removes one); a list selects among them."""
        if isinstance(value, list):
            for name in value:
                if name not in under:
                    hint = _nearest(str(name), under)
                    self.problems.append(f"{path}: no arm {name!r}{hint} (from {label})")
            return {name: under[name] for name in value if name in under}
        if not isinstance(value, dict):
            self.problems.append(
                f"{path}: should be a mapping of arms or a list of their names, "
                f"found {value!r} (from {label})"
            )
            return under
        arms = dict(under)
        for name, overrides in value.items():
            if overrides is None:
                arms.pop(name, None)
            elif not isinstance(overrides, dict):
                self.problems.append(
                    f"{path}.{name}: should be a mapping of keys, found {overrides!r} "
                    f"(from {label})"
                )
            else:
                flat = dict(_flatten(overrides))
                arms[str(name)] = {**arms.get(name, {}), **flat}
                self.origin |= {f"{path}.{name}.{inner}": label for inner in flat}
        return arms


def _flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# -------------------------------------------------------------------------------------- validation


def _validate(merged: _Merge, spec: str) -> Recipe:
    problems = list(merged.problems)
    tree = copy.deepcopy(merged.tree)
    arms = {}
    for grid in GRIDS:
        if isinstance(tree[grid], dict):
            arms[grid], tree[grid]["arms"] = tree[grid]["arms"], {}
    recipe = _parse(tree, Recipe, "", problems, merged.origin)
    for grid, overrides in arms.items():
        checked = _check_arms(getattr(recipe, grid), grid, overrides, problems, merged.origin)
        section = getattr(recipe, grid).model_copy(update={"arms": checked})
        recipe = recipe.model_copy(update={grid: section})
        if not overrides and not any(p.startswith(f"{grid}.arms") for p in problems):
            problems.append(f"{grid}.arms: at least one arm is needed")
    problems += combination_problems(recipe)
    if problems:
        raise RecipeError(
            list(dict.fromkeys(problems)), where=f"recipe {spec}", do="w2vrep schema lists all keys"
        )
    return recipe


def _parse(
    tree: Tree, model: type[Recipe], prefix: str, problems: list[str], origin: dict[str, str]
) -> Recipe:
    """Validate; on errors report them all and go on with what is left, so that later checks run."""
    for _ in range(20):
        try:
            return model.model_validate(tree)
        except ValidationError as error:
            for path, message in _messages(error, tree, model):
                source = origin.get(path)
                problems.append(
                    f"{prefix}{path}: {message}" + (f" (from {source})" if source else "")
                )
                _remove(tree, path)
    raise RecipeError(problems)


def _check_arms(
    section: Section, grid: str, arms: Tree, problems: list[str], origin: dict[str, str]
) -> Tree:
    valid = [path for path in known_paths(type(section)) if not path.startswith("arms")]
    checked: Tree = {}
    for arm, overrides in arms.items():
        where = f"{grid}.arms.{arm}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", arm):
            problems.append(f"{where}: an arm's name is a folder's: letters, digits, _ . - only")
            continue
        good: Tree = {}
        for path, value in overrides.items():
            source = origin.get(f"{where}.{path}")
            suffix = f" (from {source})" if source else ""
            if path not in valid:
                hint = _nearest(path, valid)
                problems.append(f"{where}.{path}: unknown key{hint}{suffix}")
                continue
            try:
                section.with_overrides({path: value, "arms": {}})
                good[path] = value
            except ValidationError as error:
                for _, message in _messages(error, {path: value}, type(section)):
                    problems.append(f"{where}.{path}: {message}{suffix}")
        checked[arm] = good
    return checked


def _messages(
    error: ValidationError, tree: Tree, model: type[BaseModel]
) -> Iterator[tuple[str, str]]:
    """(dotted path, message) of each error; the branches of a union become one message."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        keys = _real_path(item["loc"], tree)
        path = ".".join(keys)
        if item["type"] == "extra_forbidden":
            siblings = _fields_at(model, keys[:-1])
            hint = _nearest(keys[-1], siblings) or _moved(keys, model)
            message = f"unknown key{hint}"
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            message = message.removeprefix("input ")
            if not isinstance(item["input"], dict | list):
                message += f", found {item['input']!r}"
        found.setdefault(path, []).append(message)
    for path, messages in found.items():
        yield path, " or ".join(dict.fromkeys(messages))


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


def _fields_at(model: type[BaseModel], keys: Sequence[str]) -> list[str]:
    for name in keys:
        info = model.model_fields.get(name)
        if info is None or not (isinstance(info.annotation, type)):
            return []
        if not issubclass(info.annotation, BaseModel):
            return []
        model = info.annotation
    return list(model.model_fields)


def _moved(keys: Sequence[str], model: type[BaseModel]) -> str:
    """A hint for a key that exists elsewhere, such as pretrain.learning_rate."""
    paths = [path for path in known_paths(model) if path.split(".")[-1] == keys[-1]]
    inside = [path for path in paths if path.startswith(keys[0] + ".")]
    near = inside or paths
    return f"; did you mean {near[0]}?" if near else ""


def known_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a section."""
    paths = []
    for name, info in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            paths += known_paths(info.annotation, f"{prefix}{name}.")
    return paths


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        last = name.split(".")[-1]
        near = [path for path in names if path.split(".")[-1] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _remove(tree: Tree, path: str) -> None:
    *parents, last = path.split(".")
    inner: Any = tree
    for part in parents:
        if isinstance(inner, list):
            break
        inner = inner[part]
    if isinstance(inner, list):  # an item of a list: the whole list goes
        _remove(tree, ".".join(parents))
    else:
        inner.pop(last, None)


# ---------------------------------------------------------------------------------------- dumping


def _write(section: Section, depth: int, lines: list[str], sources: bool) -> None:
    pad = "  " * depth
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            lines.append(f"{pad}{name}:")
            _write(value, depth + 1, lines, sources)
        elif name == "arms":
            lines.append(f"{pad}{name}:")
            for arm, overrides in value.items():
                lines.append(f"{pad}  {arm}: {_scalar(overrides)}")
        else:
            extra = info.json_schema_extra
            source = extra.get("source") if isinstance(extra, dict) else None
            default = info.get_default(call_default_factory=True)
            changed = depth > 0 and value != default
            note = "" if not sources or not source or depth == 0 or changed else f"  # {source}"
            lines.append(f"{pad}{name}: {_scalar(value)}{note}")


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
