"""The JSON schema of the YAML of `mergelab sae train`, for editors."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from mergelab.checkpoints.described_schema import attribute_texts, described_schema
from mergelab.sae.toy import ToyGroundTruth
from mergelab.sae.training.config import SAESection, TrainConfig, TrainingRecipe
from mergelab.sae.variants import VARIANTS

__all__ = ["training_schema"]

_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def training_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a training: sections, and the options of every variant."""
    schema = described_schema(TrainConfig)
    parts = schema["$defs"]
    section = parts["SAESection"]
    common = dict(section["properties"])
    section["properties"] |= {"variant": _variants(common["variant"])}
    section["additionalProperties"] = True  # each variant below says which
    section["allOf"] = []
    for name, kind in VARIANTS.items():
        options = {**_options(kind), **{key: common[key] for key in ("d_in", "n_latents")}}
        section["allOf"].append(
            {
                "if": {"properties": {"variant": {"const": name}}, "required": _named(name)},
                "then": {
                    "properties": options,
                    "propertyNames": {"enum": ["variant", *options]},
                },
            }
        )
    parts["DataSection"]["properties"]["toy"] = {
        "description": "Options of `toy`.",
        "type": "object",
        "properties": _options(ToyGroundTruth),
        "additionalProperties": False,
    }
    recipe = {
        option.metadata.get("key", option.name): option for option in dataclasses.fields(TrainingRecipe)
    }
    texts = attribute_texts(TrainingRecipe)
    for key, value in parts["TrainSection"]["properties"].items():
        if key in recipe and recipe[key].name in texts:
            value["description"] = texts[recipe[key].name]
    return {**schema, "title": "A training of mergelab sae train"}


def _named(name: str) -> list[str]:
    """What must be there for a variant to be meant: the default one is also meant where none is named."""
    return [] if name == SAESection.model_fields["variant"].default else ["variant"]


def _variants(default: dict[str, Any]) -> dict[str, Any]:
    kinds = [
        {"const": name, "description": (kind.__doc__ or "").split("\n\n")[0].strip()}
        for name, kind in VARIANTS.items()
    ]
    return {**{key: value for key, value in default.items() if key != "type"}, "anyOf": kinds}


def _options(kind: type) -> dict[str, Any]:
    """The fields of a dataclass as properties."""
    hints, texts = typing.get_type_hints(kind), attribute_texts(kind)
    found: dict[str, Any] = {}
    for option in dataclasses.fields(kind):
        found[option.name] = _typed(hints[option.name])
        if option.name in texts:
            found[option.name]["description"] = texts[option.name]
        if option.default is not dataclasses.MISSING:
            default = option.default
            found[option.name]["default"] = list(default) if isinstance(default, tuple) else default
    return found


def _typed(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"anyOf": [_typed(part) for part in typing.get_args(hint)]}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": _typed(typing.get_args(hint)[0])}
    return {"type": _TYPES[hint]} if hint in _TYPES else {}
