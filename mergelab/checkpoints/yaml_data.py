"""Strict YAML as plain data with line numbers: no tags, no duplicate keys, every expansion counted first.

It is read from the parser's events and not by PyYAML's own constructors: those follow aliases without
counting, recurse as deep as the text nests, and raise what Python's `int` and `date` happen to raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mergelab.errors import CheckpointError, MergelabError, dotted, quoted, shortened

__all__ = ["YamlDocument", "parse_yaml"]

FieldPath = tuple[str | int, ...]

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
_MAX_DIGITS = 400  # more than any float64 has before its point

# What YAML 1.1 takes for a number, and 1.2 for another number or for text: 010 is 8, and 1:30 is 90.
_OLD_NUMBERS: tuple[tuple[int, re.Pattern[str]], ...] = (
    (2, re.compile(r"[-+]?0b[01_]+")),
    (8, re.compile(r"[-+]?0[0-7_]+")),
    (16, re.compile(r"[-+]?0x[0-9a-fA-F_]+")),
    (60, re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")),
)
_LONGEST_OLD = 40

_NO_TEXT = re.compile("[\0\ud800-\udfff]")

# libyaml reads the same language thirty times as fast, where PyYAML was built with it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class YamlDocument:
    """One YAML document as plain data.

    Attributes:
        data: mappings with string keys, lists and scalars.
        line: its first line (1-based).
        lines: the line of each field and list item.
        repeated: the fields that are written more than once, with the line of the one before each.
        old_numbers: the numbers that were read as YAML 1.1 reads them: what is written, and what it is.
    """

    data: Any
    line: int
    lines: dict[FieldPath, int] = field(default_factory=dict)
    repeated: list[tuple[FieldPath, int]] = field(default_factory=list)
    old_numbers: list[tuple[FieldPath, str, float]] = field(default_factory=list)


@dataclass(eq=False)
class _Node:
    """A scalar (text), a list of nodes or a list of pairs, and how many values its aliases expand to.

    Attributes:
        kind: `scalar`, `list` or `mapping`.
        line: 1-based.
        text, plain: text of a scalar, and whether it is written without quotes.
        children: entries of a list; keys and values of a mapping in turn.
        count: the values in it, those behind aliases counted each time.
        height: the levels in it.
        open: whether it has not ended yet.
    """

    kind: str
    line: int
    text: str = ""
    plain: bool = False
    children: list[_Node] = field(default_factory=list)
    count: int = 1
    height: int = 0
    open: bool = False


def parse_yaml(
    text: str,
    source: str,
    error: type[MergelabError] = CheckpointError,
    *,
    strict_keys: bool = True,
    old_numbers: bool = False,
) -> list[YamlDocument]:
    """Parses every document of a YAML text.

    Args:
        text: the YAML.
        source: what it is, for messages.
        error: what is raised.
        strict_keys: refuse a key that stands twice in one mapping; otherwise the later one wins.
        old_numbers: read octal, binary and sexagesimal numbers as YAML 1.1 does: `010` is 8, `1:30` is 90.

    Raises:
        MergelabError: `error`: faulty YAML, duplicate keys, tags, numbers beyond float64, more than 50
            levels, or more than 100,000 values, aliases expanded; every sentence begins with `source` and a
            line.
    """
    source = shortened(source, 200)
    try:
        nodes = list(_compose(text, source, error))
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        line = f"{mark.line + 1}:" if mark else ""
        note = f" {failure.context}" if failure.context else ""
        raise error(f"{source}:{line} not valid YAML: {shortened(f'{failure.problem}{note}', 300)}") from None
    except yaml.YAMLError as failure:
        reason = shortened(" ".join(str(failure).split()), 300)
        raise error(f"{source}: not valid YAML: {reason}") from None
    except UnicodeEncodeError:
        raise error(f"{source}: not valid YAML: it holds half a surrogate pair, which is not text") from None
    return [_Converter(source, error, strict_keys, old_numbers).document(node) for node in nodes]


def _compose(text: str, source: str, error: type[MergelabError]) -> Iterator[_Node]:
    """The root node of each document; stops at the first node too many or too deep."""
    anchors: dict[str, _Node] = {}
    stack: list[_Node] = []
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.DocumentStartEvent):
            anchors = {}
            continue
        if isinstance(event, yaml.StreamStartEvent | yaml.StreamEndEvent | yaml.DocumentEndEvent):
            continue
        place = f"{source}:{event.start_mark.line + 1}:"
        if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            node = stack.pop()
            node.open = False
        else:
            node = _node(event, place, anchors, error)
        if node.open:
            if len(stack) >= MAX_DEPTH:
                raise error(f"{place} nested too deeply (more than {MAX_DEPTH} levels)")
            stack.append(node)
            continue
        if not stack:
            yield node
            continue
        parent = stack[-1]
        parent.children.append(node)
        parent.count += node.count
        parent.height = max(parent.height, node.height + 1)
        if parent.count > MAX_NODES:
            raise error(f"{place} lists and aliases expand to more than {MAX_NODES:,} values")
        if len(stack) + node.height > MAX_DEPTH:
            raise error(f"{place} nested too deeply (more than {MAX_DEPTH} levels)")


def _node(event: Any, place: str, anchors: dict[str, _Node], error: type[MergelabError]) -> _Node:
    """The node that an event begins, or the one an alias names."""
    if isinstance(event, yaml.AliasEvent):
        found = anchors.get(event.anchor)
        if found is None:
            raise error(f"{place} not valid YAML: found undefined alias {quoted(event.anchor)}")
        if found.open:
            raise error(f"{place} nested too deeply (an alias inside its own anchor)")
        # Each use has its own line; what is below it is shared.
        return _Node(
            found.kind,
            event.start_mark.line + 1,
            found.text,
            found.plain,
            found.children,
            found.count,
            found.height,
        )
    if event.tag is not None:
        raise error(f"{place} not valid YAML: tag {quoted(event.tag)} is not allowed here")
    line = event.start_mark.line + 1
    if isinstance(event, yaml.ScalarEvent):
        # The two parsers write "no quotes" in two ways.
        node = _Node("scalar", line, event.value, event.style in (None, ""))
    else:
        kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
        node = _Node(kind, line, open=True)
    if event.anchor is not None:
        anchors[event.anchor] = node
    return node


class _Converter:
    """Turns composed nodes into data."""

    def __init__(self, source: str, error: type[MergelabError], strict_keys: bool, old_numbers: bool) -> None:
        self.source, self.error, self.strict_keys = source, error, strict_keys
        self.reads_old = old_numbers
        self.old_numbers: list[tuple[FieldPath, str, float]] = []
        self.faults: list[str] = []
        self.lines: dict[FieldPath, int] = {}
        self.repeated: list[tuple[FieldPath, int]] = []

    def document(self, node: _Node) -> YamlDocument:
        data = self.convert(node, ())
        if self.faults:
            raise self.error(self.faults)
        return YamlDocument(data, node.line, {(): node.line, **self.lines}, self.repeated, self.old_numbers)

    def convert(self, node: _Node, path: FieldPath) -> Any:
        if node.kind == "scalar":
            return self.scalar(node, path)
        if node.kind == "list":
            items = []
            for i, child in enumerate(node.children):
                self.lines[(*path, i)] = child.line
                items.append(self.convert(child, (*path, i)))
            return items
        return self.mapping(node, path)

    def mapping(self, node: _Node, path: FieldPath) -> dict[str, Any]:
        seen: dict[str, int] = {}
        merged: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for key_node, value_node in zip(node.children[::2], node.children[1::2], strict=True):
            if key_node.kind != "scalar":
                self.fault(key_node, path, "a key must be a plain word")
                continue
            key = key_node.text
            if key in seen and self.strict_keys:
                message = f"duplicate key, first set on line {seen[key]}: remove one of the two"
                self.fault(key_node, (*path, key), message)
                continue
            if key in seen:
                self.repeated.append(((*path, key), seen[key]))
            self.check_text(key_node, path)
            seen[key] = key_node.line
            if key == "<<" and key_node.plain:
                merged = self.merged(value_node, path)
                continue
            self.lines[(*path, key)] = key_node.line
            data[key] = self.convert(value_node, (*path, key))
        return {**{k: v for k, v in merged.items() if k not in data}, **data}

    def merged(self, node: _Node, path: FieldPath) -> dict[str, Any]:
        """The mappings behind a `<<` key; earlier ones win, and all give way to keys written out."""
        children = node.children if node.kind == "list" else [node]
        result: dict[str, Any] = {}
        for child in children:
            if child.kind != "mapping":
                self.fault(child, (*path, "<<"), "a merge key takes an alias of a mapping, or a list of them")
                continue
            for key, value in self.convert(child, path).items():
                result.setdefault(key, value)
        return result

    def scalar(self, node: _Node, path: FieldPath) -> bool | int | float | str | None:
        value = self.core_scalar(node, path)
        old = _old_number(node.text) if self.reads_old and node.plain else None
        if old is None or old == value:
            return value
        self.old_numbers.append((path, node.text, old))
        return old

    def core_scalar(self, node: _Node, path: FieldPath) -> bool | int | float | str | None:
        """The scalar by the core schema of YAML 1.2."""
        text = node.text
        self.check_text(node, path)
        # No number, switch or null is longer, and a pattern costs time for each character.
        kind = (
            next((kind for kind, pattern in _SCALARS if pattern.fullmatch(text)), "str")
            if node.plain
            else "str"
        )
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text) if len(text) < 40 else self.number(node, path, text)
            case "hex":
                return int(text, 0) if len(text) < 40 else self.number(node, path, text)
            case "float":
                return self.number(node, path, text)
            case "special":
                return float(text.replace(".", "", 1))
        return text

    def number(self, node: _Node, path: FieldPath, text: str) -> float:
        """The text as float64; a fault where it is beyond its range, and then 0."""
        try:
            # Past so many digits, whether it is in range takes time to tell and is of no use to know.
            value = float(int(text, 0)) if text.startswith(("0x", "0o")) else float(text)
        except (OverflowError, ValueError):
            value = math.inf
        if len(text) > _MAX_DIGITS or not math.isfinite(value):
            self.fault(
                node, path, f"the number {shortened(text, 40)} is too large or too long: write a smaller one"
            )
            return 0.0
        return value

    def check_text(self, node: _Node, path: FieldPath) -> None:
        if _NO_TEXT.search(node.text):
            self.fault(node, path, f"{quoted(node.text, 40)} holds a character that no text has: remove it")

    def fault(self, node: _Node, path: FieldPath, message: str) -> None:
        place = f"{dotted(path)}: " if path else ""
        self.faults.append(f"{self.source}:{node.line}: {place}{message}")


def _old_number(text: str) -> int | float | None:
    """The number that YAML 1.1 reads where YAML 1.2 may not; None where it has no such form."""
    if len(text) > _LONGEST_OLD:
        return None
    base = next((base for base, pattern in _OLD_NUMBERS if pattern.fullmatch(text)), None)
    if base is None:
        return None
    digits = text.replace("_", "")
    try:
        if base != 60:
            return int(digits, base)
        sign = -1 if digits.startswith("-") else 1
        value: int | float = 0
        for part in digits.lstrip("+-").split(":"):
            value = 60 * value + (float(part) if "." in part else int(part))
    except ValueError:  # nothing but underscores
        return None
    return sign * value
