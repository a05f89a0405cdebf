"""A recipe as YAML, and the schema of recipe files for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reproduce.recipe import yaml12
from reproduce.recipe.schema import Recipe, Section


def as_yaml(recipe: Recipe, origin: Mapping[str, str] | None = None) -> str:
    """The resolved recipe as YAML, every default filled in; loaded again, it is the same recipe.

    Beside each default stands its source, beside each other value the layer it came from.

    Args:
        origin: dotted path -> layer, as `resolve` gives it.
    """
    lines = ["extends: null  # complete: stands on nothing, these are all its arms"]
    _write(recipe, Recipe(name=""), "", "", lines, origin or {})
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
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
        "extends": text
        | {"description": "recipes laid below this one, always; null: none, its arms are all"},
        "protocol": text | {"description": "recipes laid below this one if nothing else is"},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _write(
    section: Section,
    base: Section,
    prefix: str,
    above: str,
    lines: list[str],
    origin: Mapping[str, str],
) -> None:
    """Lines of a section.

    Args:
        base: the same section of the defaults.
        above: the source of the section itself, that of the defaults it changes in its fields.
    """
    pad = "  " * prefix.count(".")
    for name, info in type(section).model_fields.items():
        value, standard = getattr(section, name), getattr(base, name)
        extra = info.json_schema_extra
        source = str(extra.get("source", "")) if isinstance(extra, dict) else ""
        if standard != info.get_default(call_default_factory=True):
            source = above
        path = f"{prefix}{name}"
        if isinstance(value, Section):
            lines.append(f"{pad}{name}:")
            _write(value, standard, f"{path}.", source, lines, origin)
        elif name == "arms":
            lines.append(f"{pad}{name}:")
            lines += [f"{pad}  {arm}: {yaml12.dump(overrides)}" for arm, overrides in value.items()]
        else:
            note = source if value == standard else origin.get(path, "")
            note = f"  # {note}" if note and prefix else ""
            lines.append(f"{pad}{name}: {yaml12.dump(value)}{note}")
