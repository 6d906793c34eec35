"""JSON schemas of typed configurations, with the descriptions that their docstrings hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

__all__ = ["attribute_texts", "described_schema"]


def attribute_texts(kind: type) -> dict[str, str]:
    """Descriptions by attribute: the section `Attributes:` of a class's docstring, and of its bases'."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(base.__doc__ or ""), re.M)
        for names, text in re.findall(
            r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.M
        ):
            found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


def described_schema(kind: type[BaseModel], kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a pydantic class and of what it holds, with descriptions.

    Args:
        kind: the class.
        kinds: classes whose docstrings describe the definitions of their names; the classes of its fields
            need not be given.
    """
    schema = _with_bounds(kind.model_json_schema(mode="validation"))
    if "$ref" in schema:  # of a class that holds itself
        schema = {**schema["$defs"][kind.__name__], "$defs": schema["$defs"]}
    classes = {found.__name__: found for found in _classes(kind)} | dict(kinds or {})
    for name, part in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
        texts = attribute_texts(classes[name]) if name in classes else {}
        if name in classes:
            part["description"] = (inspect.getdoc(classes[name]) or "").split("\n\n")[0].replace("\n", " ")
        for key, value in part.get("properties", {}).items():
            value.pop("title", None)
            if key in texts:
                value["description"] = texts[key]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_bounds(part: Any) -> Any:
    """The schema with bounds under JSON schema's names; behind a validator, pydantic keeps its own."""
    if isinstance(part, list):
        return [_with_bounds(each) for each in part]
    if not isinstance(part, dict):
        return part
    dropped = {"allow_inf_nan"} if "type" in part else set()
    return {_BOUNDS.get(key, key): _with_bounds(value) for key, value in part.items() if key not in dropped}


def _classes(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The pydantic classes that the fields of one hold, and itself."""
    found: set[type[BaseModel]] = set()
    waiting: list[Any] = [kind]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            if one not in found:
                found.add(one)
                waiting += [field.annotation for field in one.model_fields.values()]
        else:
            waiting += getattr(one, "__args__", ())
    return found
