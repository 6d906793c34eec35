"""The JSON schema of recipes, for editors: fields of `Recipe`, hyper-parameters of every operator."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mergelab.checkpoints.described_schema import described_schema
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import IGNORED
from mergelab.operators import OPERATORS

__all__ = ["recipe_schema"]

_SCALAR = {"type": ["boolean", "number", "string", "null"]}
_VALUES = {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]}
_ENTRY = {
    "type": "object",
    "properties": {
        "filter": {"type": "string", "description": "Part of a tensor's name; '*' matches every tensor."},
        "value": {"$ref": "#/$defs/Values"},
    },
    "required": ["value"],
    "additionalProperties": False,
}
_SETTING = {
    "description": "A value, a gradient over the layers, or entries of a filter and a value.",
    "anyOf": [
        {"$ref": "#/$defs/Values"},
        {"$ref": "#/$defs/Entry"},
        {"type": "array", "items": {"$ref": "#/$defs/Entry"}},
    ],
}
_PART = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "revision": {"type": ["string", "null"]}},
    "required": ["path"],
    "additionalProperties": False,
}
_MODEL = {
    "description": "A folder, a GGUF file, a hub id, or the name of another document: "
    "path[@revision][+adapter[@revision]].",
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {
                "model": {"anyOf": [{"type": "string"}, _PART]},
                "lora": {"anyOf": [{"type": "string"}, _PART, {"type": "null"}]},
            },
            "required": ["model"],
        },
    ],
}
_MODELS = ("model", "base_model", "tokenizer_source")


def recipe_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one document of a recipe; what is read with a warning fails it."""
    schema = described_schema(Recipe)
    del schema["properties"]["merges"]  # Python's alone: a file holds further documents
    parts = schema["$defs"]
    parts |= {"Values": _VALUES, "Entry": _ENTRY, "Setting": _SETTING, "ModelReference": _MODEL}
    parts["Parameters"] = {
        "type": ["object", "null"],
        "properties": {**{name: {} for name in sorted(IGNORED)}, **_parameters()},
        "additionalProperties": False,
    }
    parts.pop("Recipe", None)
    for part in (schema, *parts.values()):
        properties = part.get("properties", {})
        if "parameters" in properties:
            properties["parameters"] = {"$ref": "#/$defs/Parameters"}
        for name in _MODELS:
            if name in properties and part is not _MODEL["anyOf"][1]:
                properties[name] = {"$ref": "#/$defs/ModelReference"}
    schema["properties"]["merge_method"] = {
        "description": "What the models are merged by.",
        "anyOf": [
            {"const": name, "description": operator.summary} for name, operator in sorted(OPERATORS.items())
        ],
    }
    return {**schema, "title": "A recipe of mergelab or mergekit"}


def _parameters() -> dict[str, Any]:
    """Every hyper-parameter of every operator, with the operators that take it and their ranges."""
    taken: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, operator in sorted(OPERATORS.items()):
        for parameter in operator.parameters:
            what = " | ".join(parameter.choices) or parameter.type.__name__
            if (parameter.low, parameter.high) != (float("-inf"), float("inf")):
                what += f" from {parameter.low:g} to {parameter.high:g}"
            if not parameter.required:
                what += f", default {parameter.default}"
            taken[parameter.name][what].append(name)
    return {
        name: {
            "description": "; ".join(f"{', '.join(names)}: {what}" for what, names in kinds.items()),
            "$ref": "#/$defs/Setting",
        }
        for name, kinds in sorted(taken.items())
    }
