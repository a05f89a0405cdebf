"""Layers and ``--set`` to a Recipe; shipped recipes; every problem at once."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from reproduce.errors import RecipeError, UsageError
from reproduce.recipe import yaml12
from reproduce.recipe.checks import combination_problems
from reproduce.recipe.messages import known_paths, nearest, shown, validation_messages
from reproduce.recipe.schema import Recipe, Section
from reproduce.shipped import shipped

GRIDS = ("pretrain", "finetune")
ARM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
"""A folder's name, a step of a dotted path, and part of ``ARM/seed-N``."""
BASE = "as-written"
"""The recipe that the schema's defaults are; its file is empty."""

Tree = dict[str, Any]
Origin = dict[str, str]


@dataclass(frozen=True)
class Layer:
    """One recipe file (or a ``--set`` option) as a tree.

    Attributes:
        label: what to call it in messages.
        tree: its keys, without ``extends`` and ``protocol``.
        complete: ``extends: null``: it stands on nothing, so its arms are all there are.
    """

    label: str
    tree: Tree
    complete: bool = False


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def load_recipe(spec: str, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of ``a+b+./mine.yaml`` with ``--set a.b=value`` laid over it.

    Raises:
        UsageError: no such recipe, or a ``--set`` that isn't ``key=value``.
        RecipeError: every problem found, each with its dotted path and the nearest valid name.
    """
    return resolve(spec, sets)[0]


def resolve(spec: str, sets: Sequence[str] = ()) -> tuple[Recipe, Origin]:
    """`load_recipe`, and which layer each value came from."""
    merged = _Merge()
    for layer in [*_layers(spec), *map(_set_layer, sets)]:
        merged.lay(layer)
    if "name" not in merged.origin:
        merged.tree["name"] = "+".join(_stem(part) for part in _split(spec))
    return _validate(merged, spec), merged.origin


# ------------------------------------------------------------------------------------------ layers


def _split(spec: str) -> list[str]:
    """The parts of ``a+b``; a path may hold a plus itself."""
    words = spec.split("+")
    parts = []
    while words:
        ends = (n for n in range(len(words), 1, -1) if Path("+".join(words[:n])).is_file())
        end = next(ends, 1)
        parts.append("+".join(words[:end]).strip())
        words = words[end:]
    if not all(parts):
        raise UsageError(f"an empty name in recipe {spec!r}", do="join names by +, as in a+b")
    return parts


def _stem(part: str) -> str:
    return re.sub(r"\.ya?ml$", "", Path(part).name)


def _layers(spec: str) -> list[Layer]:
    """Layers in order; a layer is laid once.

    ``extends`` names what a layer's differences are relative to: it is laid first, always.
    ``protocol`` names what a size stands on when nothing else lies below it.
    """
    layers: list[Layer] = []
    laid: set[Path] = set()

    def add(part: str, folder: Path, above: tuple[Path, ...], where: str) -> None:
        path = _find(part, folder, where)
        if path in above:
            raise RecipeError([f"extends: {part} stands on itself"], where=where)
        if path in laid:
            return
        tree = _read(path, part)
        complete = "extends" in tree and tree["extends"] is None
        below = {key: tree.pop(key, None) for key in ("protocol", "extends")}
        for key, value in below.items():
            if value is not None and not isinstance(value, str):
                raise RecipeError(
                    [f"{key}: should be a recipe's name, found {value!r}"], where=part
                )
            if value is not None and (key == "extends" or not layers):
                for name in _split(value):
                    add(name, path.parent, (*above, path), f"{part}, {key}")
        layers.append(Layer(part, tree, complete))
        laid.add(path)

    for part in _split(spec):
        if layers and (part == BASE or _find(part) in laid):
            raise UsageError(
                f"{part} lies below {layers[-1].label} already",
                where=f"recipe {spec}",
                do="name what lies below first, and once: a protocol, then a size",
            )
        add(part, Path(), (), f"recipe {spec}" if part != spec else "")
    return layers


def _find(part: str, folder: Path = Path(), where: str = "") -> Path:
    """The file of a shipped recipe's name, or of a path relative to a folder."""
    known = shipped_recipes()
    if part in known:
        return known[part].resolve()
    path = folder / part
    if path.is_file():
        return path.resolve()
    near = difflib.get_close_matches(part, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"no recipe {part!r}",
        where=where,
        do=f"{hint}shipped recipes: {', '.join(known)}; or give the path of a YAML file",
    )


def _read(path: Path, label: str) -> Tree:
    try:
        tree = yaml12.load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError([_yaml_problem(error)], where=label) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: byte {error.start}", where=label) from None
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror}", where=label) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError([f"a recipe is a mapping, found {type(tree).__name__}"], where=label)
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {error}".splitlines()[0]
    if "'\\t'" in str(error.problem):
        text = "a tab, where YAML wants spaces"
    else:
        text = ", ".join(part for part in (error.context, error.problem) if part)
    return f"line {error.problem_mark.line + 1}: {text}" if error.problem_mark else text


def _set_layer(text: str) -> Layer:
    path, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in path.split(".")):
        raise UsageError(f"--set {text!r} isn't key=value", do="as in --set pretrain.updates=100")
    if path.strip() in ("extends", "protocol"):
        raise UsageError(f"{path.strip()} is for recipe files", do="join recipes by +, as in a+b")
    try:
        parsed = yaml12.load(value)
    except (yaml.reader.ReaderError, yaml.scanner.ScannerError, yaml.parser.ParserError):
        parsed = value  # no YAML: text as it stands
    except yaml.YAMLError as error:
        raise RecipeError([_yaml_problem(error)], where=f"--set {text}") from None
    keys = path.strip().split(".")
    # everything behind an arm's name is one dotted key of that arm
    if len(keys) > 3 and keys[0] in GRIDS and keys[1] == "arms":
        keys = [*keys[:3], ".".join(keys[3:])]
    tree: Any = parsed
    for part in reversed(keys):
        tree = {part: tree}
    return Layer(f"--set {text}", tree)


@dataclass
class _Merge:
    """Layers laid over each other, and which layer each value came from."""

    tree: Tree = field(default_factory=lambda: Recipe().model_dump())
    origin: Origin = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lay(self, layer: Layer) -> None:
        if layer.complete:
            for grid in GRIDS:
                if isinstance(self.tree[grid], dict):
                    self.tree[grid]["arms"] = {}
        self._lay(self.tree, layer.tree, "", layer.label)

    def _lay(self, under: Tree, over: Tree, prefix: str, label: str) -> None:
        for name, value in over.items():
            path = f"{prefix}{name}"
            below = under.get(name)
            if not isinstance(name, str):
                self._problem(path, f"a key is text, found {name!r}; put it in quotes", label)
            elif "." in name:
                nested = name.replace(".", ": {") + ": ..." + "}" * name.count(".")
                self._problem(path, f"a dotted key is for arms; here write {nested}", label)
            elif value is None and isinstance(below, dict):
                self._problem(path, "empty; give it keys or leave it out", label)
            elif path in ("pretrain.arms", "finetune.arms"):
                under[name] = self._arms(below or {}, value, path, label)
            elif isinstance(value, dict) and (below is None or isinstance(below, dict)):
                self._lay(under.setdefault(name, {}), value, f"{path}.", label)
            else:
                under[name] = value
                self.origin[path] = label

    def _arms(self, under: Tree, value: Any, path: str, label: str) -> Tree:
        """A mapping adds to the arms below (null removes one); a list selects among them."""
        if isinstance(value, list):
            known = [name for name in value if isinstance(name, str) and name in under]
            for name in value:
                if name not in known:
                    self._problem(path, f"no arm {name!r}{nearest(str(name), under)}", label)
            return {name: under[name] for name in known}
        if not isinstance(value, dict):
            text = f"should be a mapping of arms or a list of their names, found {shown(value)}"
            self._problem(path, text, label)
            return under
        arms = dict(under)
        for name, overrides in value.items():
            where = f"{path}.{name}"
            if not isinstance(name, str):
                self._problem(where, f"a name is text, found {name!r}; put it in quotes", label)
            elif overrides is None:
                if arms.pop(name, None) is None:
                    self._problem(where, f"no arm to remove{nearest(name, under)}", label)
            elif not isinstance(overrides, dict):
                text = f"should be a mapping of keys, found {shown(overrides)}"
                self._problem(where, text, label)
            else:
                flat = dict(_flatten(overrides))
                arms[name] = {**arms.get(name, {}), **flat}
                self.origin |= {f"{where}.{inner}": label for inner in flat}
        return arms

    def _problem(self, path: str, text: str, label: str) -> None:
        self.problems.append(f"{path}: {text} (from {label})")


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
    recipe = _parse(tree, problems, merged.origin)
    for grid, overrides in arms.items():
        checked = _check_arms(getattr(recipe, grid), grid, overrides, problems, merged.origin)
        section = getattr(recipe, grid).model_copy(update={"arms": checked})
        recipe = recipe.model_copy(update={grid: section})
        if not overrides and not any(p.startswith(f"{grid}.arms") for p in problems):
            problems.append(f"{grid}.arms: at least one arm is needed")
    # where a value was left out for being wrong, combinations with its default say nothing
    broken = {problem.split(".")[0] for problem in problems if ": unknown key" not in problem}
    for problem in combination_problems(recipe):
        if problem.split(".")[0] not in broken:
            problems.append(problem + _from(problem.partition(": ")[0], merged.origin))
    if problems:
        raise RecipeError(
            list(dict.fromkeys(problems)), where=f"recipe {spec}", do="w2vrep schema lists all keys"
        )
    return recipe


def _from(path: str, origin: Origin) -> str:
    """Which layer a key came from, or what holds it (a list, an arm's stage) or it holds."""
    keys = path.split(".")
    paths = [".".join(keys[:n]) for n in range(len(keys), 0, -1)]
    if keys[1:2] == ["arms"] and len(keys) > 3:
        paths.append(".".join([keys[0], *keys[3:]]))
    paths += [inner for inner in origin if inner.startswith(f"{path}.")]
    found = next((origin[path] for path in paths if path in origin), None)
    return f" (from {found})" if found else ""


def _parse(tree: Tree, problems: list[str], origin: Origin) -> Recipe:
    """Validate; report all that is wrong and go on with the rest, so that later checks run."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        for keys, message in validation_messages(error, tree, Recipe):
            path = ".".join(keys)
            problems.append(f"{path}: {message}{_from(path, origin)}")
            _remove(tree, keys)
        return Recipe.model_validate(tree)


def _check_arms(
    section: Section, grid: str, arms: Tree, problems: list[str], origin: Origin
) -> Tree:
    valid = [path for path in known_paths(type(section)) if not path.startswith("arms")]
    checked: Tree = {}
    for arm, overrides in arms.items():
        where = f"{grid}.arms.{arm}"
        if not ARM_NAME.fullmatch(arm):
            problems.append(f"{where}: an arm's name has letters, digits, _ and - only")
            continue
        good: Tree = {}
        for path, value in overrides.items():
            source = _from(f"{where}.{path}", origin)
            if path not in valid:
                problems.append(f"{where}.{path}: unknown key{nearest(path, valid)}{source}")
                continue
            try:
                section.with_overrides({path: value, "arms": {}})
                good[path] = value
            except ValidationError as error:
                for _, message in validation_messages(error, {path: value}, type(section)):
                    problems.append(f"{where}.{path}: {message}{source}")
        checked[arm] = good
    return checked


def _remove(tree: Tree, keys: Sequence[str]) -> None:
    """Take a key out; of a list with a bad item, the whole list."""
    inner: Any = tree
    for depth, name in enumerate(keys):
        if depth == len(keys) - 1 or not isinstance(inner.get(name), dict):
            inner.pop(name, None)
            return
        inner = inner[name]
