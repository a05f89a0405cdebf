"""YAML as recipes are written in: scalars of YAML 1.2's core schema, a key once, no tricks.

PyYAML reads YAML 1.1, where ``010`` is eight, ``1:30`` ninety, ``1_000`` a number, ``no`` false and
``2024-01-01`` a date. Here they are what section 10.3.2 of https://yaml.org/spec/1.2.2/ says: ten,
and text. Merge keys (``<<``) stay: what they do can be seen in the file.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH, MAX_NODES = 50, 100_000
"""Of a document, its anchors written out: a recipe is 6 deep and has some 200 values."""

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str]] = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
"""Type -> what its plain scalars look like, and how they begin (NUL: an empty one)."""


def load(text: str) -> Any:
    """The one document in `text`; None if there is none.

    Raises:
        yaml.MarkedYAMLError: it isn't YAML, holds itself, or is written in what YAML 1.2 hasn't.
        yaml.YAMLError: it holds characters that YAML doesn't allow.
    """
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """`value` on one line. What any reader of YAML, old or new, may take for something else than
    text is in quotes."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below)
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("str", "seq", "map")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: list[str | None] = []
        self._sizes: dict[str, int] = {}
        self._size = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        anchor, before = getattr(event, "anchor", None), self._size
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise _problem(f"the anchor &{anchor} holds itself", event.start_mark)
            self._size += self._sizes.get(anchor or "", 0)
        self._size += 1
        if len(self._open) >= MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        if self._size > MAX_NODES:
            raise _problem(f"more than {MAX_NODES} values, anchors written out", event.start_mark)
        self._open.append(None if isinstance(event, yaml.AliasEvent) else anchor)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._open.pop()
        if anchor is not None:
            self._sizes.setdefault(anchor, self._size - before)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in seen:
                    raise _problem(f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def scalar(self, node: yaml.ScalarNode) -> bool | int | float | None:
        """What its look or its tag makes null, a bool or a number."""
        kind, text = node.tag.removeprefix(_TAG), str(self.construct_scalar(node))
        if not _matches(kind, text):
            raise _problem(f"{text!r} is no {kind} of YAML 1.2", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text[0] in "tT"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:  # Python reads no number of more than 4300 digits
            raise _problem(f"a number of {len(text)} digits", node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version resolves."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _matches(kind: str, text: str) -> bool:
    return re.fullmatch(_SCALARS[kind][0], text) is not None


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, text, mark)


for _kind, (_look, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(
            f"{_TAG}{_kind}", re.compile(rf"(?:{_look})\Z"), [c.strip("\0") for c in _first]
        )
for _kind in ("null", "bool", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.scalar)
