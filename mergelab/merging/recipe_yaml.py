"""Strict YAML for recipes: plain data with line numbers, no tags, no duplicate keys, no alias bombs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mergelab.errors import RecipeError
from mergelab.merging.faults import FieldPath, dotted

__all__ = ["Document", "parse_documents"]

MAX_NODES = 100_000
MAX_DEPTH = 50

# The YAML 1.2 core schema: `1e-4` is a number, `no` and `on` are words. Tried in this order.
_SCALARS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+")),
    ("hex", re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")),
    ("special", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes only, and refuses explicit tags."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"tag {tag!r} is not allowed here", event.start_mark)
        return super().compose_node(parent, index)


@dataclass
class Document:
    """One YAML document as plain data.

    Attributes:
        data: mappings with string keys, lists and scalars.
        line: its first line (1-based).
        lines: the line of each field and list item.
    """

    data: Any
    line: int
    lines: dict[FieldPath, int] = field(default_factory=dict)


def parse_documents(text: str, source: str = "recipe") -> list[Document]:
    """Parses every document of a YAML text; empty documents are dropped.

    Raises:
        RecipeError: faulty YAML, duplicate keys, tags, or aliases that expand beyond 100,000 nodes; every
            sentence begins with `source` and a line.
    """
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{mark.line + 1}:" if mark else ""
        note = f" {error.context}" if error.context else ""
        raise RecipeError(f"{source}:{line} not valid YAML: {error.problem}{note}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}".replace("\n", " ")) from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply (more than {MAX_DEPTH} levels)") from None
    return [_Converter(source).document(node) for node in nodes]


class _Converter:
    """Turns composed nodes into data, counting what aliases expand to."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes = 0
        self.faults: list[str] = []
        self.lines: dict[FieldPath, int] = {}

    def document(self, node: yaml.Node) -> Document:
        data = self.convert(node, (), 0)
        if self.faults:
            raise RecipeError(self.faults)
        return Document(data, _line(node), {(): _line(node), **self.lines})

    def convert(self, node: yaml.Node, path: FieldPath, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"{self.source}:{_line(node)}: nested too deeply (more than {MAX_DEPTH} levels, or an alias "
                "inside its own anchor)"
            )
        if self.nodes > MAX_NODES:
            place = f"{self.source}:{_line(node)}"
            raise RecipeError(f"{place}: aliases expand to more than {MAX_NODES:,} values")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, child in enumerate(node.value):
                self.lines[(*path, i)] = _line(child)
                items.append(self.convert(child, (*path, i), depth + 1))
            return items
        return self.mapping(node, path, depth)

    def mapping(self, node: yaml.Node, path: FieldPath, depth: int) -> dict[str, Any]:
        seen: dict[str, int] = {}
        merged: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(key_node, path, "a key must be a plain word")
                continue
            key = key_node.value
            if key in seen:
                message = f"duplicate key, first set on line {seen[key]}: remove one of the two"
                self.fault(key_node, (*path, key), message)
                continue
            seen[key] = _line(key_node)
            if key == "<<" and key_node.style is None:
                merged = self.merged(value_node, path, depth)
                continue
            self.lines[(*path, key)] = _line(key_node)
            data[key] = self.convert(value_node, (*path, key), depth + 1)
        return {**{k: v for k, v in merged.items() if k not in data}, **data}

    def merged(self, node: yaml.Node, path: FieldPath, depth: int) -> dict[str, Any]:
        """The mappings behind a `<<` key; earlier ones win, and all give way to keys written out."""
        children = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for child in children:
            if not isinstance(child, yaml.MappingNode):
                self.fault(child, (*path, "<<"), "a merge key takes an alias of a mapping, or a list of them")
                continue
            result = {**self.convert(child, path, depth + 1), **result}
        return result

    def fault(self, node: yaml.Node, path: FieldPath, message: str) -> None:
        place = f"{dotted(path)}: " if path else ""
        self.faults.append(f"{self.source}:{_line(node)}: {place}{message}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: yaml.ScalarNode) -> bool | int | float | str | None:
    text: str = node.value
    if node.style is not None:
        return text
    kind = next((kind for kind, pattern in _SCALARS if pattern.fullmatch(text)), "str")
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text) if len(text) < 40 else float(text)
        case "hex":
            return int(text, 0)
        case "float":
            return float(text)
        case "special":
            return float(text.replace(".", "", 1))
    return text
