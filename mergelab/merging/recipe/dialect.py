"""What mergekit makes of a recipe that is not quite one: the data it goes by, and a note on each difference.

mergekit reads recipes with PyYAML (YAML 1.1: `yes` is true, of two equal keys the later counts) and pydantic
(unknown keys are ignored, a text is converted to the type that a parameter has). Recipes that rely on it run
here too, with a warning for each place; see `mergekit/config.py` and `mergekit/parameter_resolver.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mergelab.errors import did_you_mean, quoted
from mergelab.merging.recipe.faults import FieldPath
from mergelab.merging.recipe.schema import Recipe
from mergelab.operators import OPERATORS
from mergelab.operators.declare import Operator

__all__ = ["RecipeReading", "read_as_mergekit"]

Note = tuple[FieldPath, str]

_YES = frozenset(["yes", "on", "true", "t", "y", "1"])
_NO = frozenset(["no", "off", "false", "f", "n", "0"])
"""Texts that pydantic takes for a boolean, in any case."""

_YAML_BOOLEANS = {"yes": 1, "on": 1, "no": 0, "off": 0}
"""Plain words that YAML 1.1 takes for a boolean, which YAML 1.2 does not."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
_LONGEST = 40
_SUGGESTED = 500
"""Unknown keys for which a known one is looked for: the rest are as many as nobody writes by hand."""

_DTYPES = ("dtype", "out_dtype")
_MODELS = ("model", "base_model", "tokenizer_source", "source")
_TYPES: Mapping[str, type] = {"force": bool, "pad_to_multiple_of": int, "token_id": int, "layer_range": int}


@dataclass
class RecipeReading:
    """A recipe's data as mergekit understands it.

    Attributes:
        data: what the schema is given.
        notes: differences from what is written, each with its place.
        misspelled: keys that have no effect and are nearly those of recipes, in the words of an error: they
            are likely to be why something else is missing.
    """

    data: Any
    notes: list[Note] = field(default_factory=list)
    misspelled: list[Note] = field(default_factory=list)
    _suggested: int = 0

    def unknown_key(self, path: FieldPath, key: str, known: list[str]) -> None:
        """Notes a key that nothing reads."""
        self._suggested += 1
        near = did_you_mean(key, known) if self._suggested <= _SUGGESTED else ""
        if key in Recipe.model_fields:
            self.notes.append(((*path, key), "has no effect here: it counts at the top of a recipe only"))
        else:
            self.notes.append(((*path, key), f"has no effect: recipes have no such key here{near}"))
        if near:
            self.misspelled.append(((*path, key), f"unknown key{near}"))


def read_as_mergekit(data: Any) -> RecipeReading:
    """Returns what a document says, with every repair noted; what mergekit refuses is left as it is."""
    reading = RecipeReading(data)
    method = data.get("merge_method") if isinstance(data, dict) else None
    operator = OPERATORS.get(method) if isinstance(method, str) else None
    reading.data = _part(data, Recipe, (), reading, operator)
    return reading


def _part(
    data: Any, kind: type[BaseModel], path: FieldPath, reading: RecipeReading, operator: Operator | None
) -> Any:
    """One mapping of a recipe, without the keys that its kind lacks, and what is in it."""
    if not isinstance(data, dict):
        return data
    found: dict[str, Any] = {}
    for key, value in data.items():
        place = (*path, key)
        if key not in kind.model_fields:
            reading.unknown_key(path, key, list(kind.model_fields))
        elif key == "parameters":
            found[key] = _parameters(value, place, reading, operator)
        elif key in _DTYPES:
            found[key] = _dtype(value, place, reading)
        elif key in _TYPES:
            found[key] = _typed(value, _TYPES[key], place, reading)
        elif key in _MODELS and isinstance(value, dict) and "kind" not in value:
            found[key] = _reference(value, place, reading)
        else:
            found[key] = _inner(value, kind.model_fields[key].annotation, place, reading, operator)
    return found


def _inner(
    value: Any, annotation: Any, path: FieldPath, reading: RecipeReading, operator: Operator | None
) -> Any:
    """The parts within a field: one, or a list or a mapping of them."""
    kind, keyed = _parts_in(annotation)
    if kind is None:
        return value
    if isinstance(value, list):
        return [_part(each, kind, (*path, i), reading, operator) for i, each in enumerate(value)]
    if keyed and isinstance(value, dict):
        return {key: _part(each, kind, (*path, key), reading, operator) for key, each in value.items()}
    return _part(value, kind, path, reading, operator)


def _parts_in(annotation: Any, keyed: bool = False) -> tuple[type[BaseModel] | None, bool]:
    """The kind of part that an annotation holds, and whether under keys of the author's own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, keyed
    keyed = keyed or get_origin(annotation) is dict
    found = [_parts_in(argument, keyed) for argument in get_args(annotation)]
    return next((each for each in found if each[0] is not None), (None, False))


def _reference(value: dict[str, Any], path: FieldPath, reading: RecipeReading) -> dict[str, Any]:
    """A model reference at length, without what mergekit ignores and what nothing here needs."""
    kept: dict[str, Any] = {}
    for key, part in value.items():
        if key == "override_architecture":
            message = "has no effect: the architecture is read off the names of the tensors"
            reading.notes.append(((*path, key), message))
        elif key not in ("model", "lora"):
            reading.unknown_key(path, key, ["model", "lora"])
        elif isinstance(part, dict):
            for inner in part:
                if inner not in ("path", "revision"):
                    reading.unknown_key((*path, key), inner, ["path", "revision"])
            kept[key] = {name: part[name] for name in ("path", "revision") if name in part}
        else:
            kept[key] = part
    return kept


def _dtype(value: Any, path: FieldPath, reading: RecipeReading) -> Any:
    if value == "":
        reading.notes.append((path, "is empty, which is as if it were not there"))
        return None
    if not isinstance(value, str) or not value.startswith("torch."):
        return value
    name = value.removeprefix("torch.")
    reading.notes.append((path, f"{quoted(value)} is read as {name}: write {name}"))
    return name


def _parameters(value: Any, path: FieldPath, reading: RecipeReading, operator: Operator | None) -> Any:
    if not isinstance(value, dict):
        return value
    found = {}
    for name, setting in value.items():
        parameter = None if operator is None else operator.parameter(name)
        kind = str if parameter is None else parameter.type
        found[name] = _setting(setting, kind, (*path, name), reading)
    return found


def _setting(setting: Any, kind: type, path: FieldPath, reading: RecipeReading) -> Any:
    """A value, a list of values, or entries of a filter and a value."""
    if isinstance(setting, list):
        return [_setting(each, kind, path, reading) for each in setting]
    if not isinstance(setting, dict) or "value" not in setting:
        return _typed(setting, kind, path, reading)
    for key in setting:
        if key not in ("filter", "value"):
            reading.unknown_key(path, key, ["filter", "value"])
    kept = {key: setting[key] for key in ("filter", "value") if key in setting}
    return kept | {"value": _setting(setting["value"], kind, path, reading)}


def _typed(value: Any, kind: type, path: FieldPath, reading: RecipeReading) -> Any:
    """A value of the type that is read here, if pydantic would make one of it; else the value."""
    if isinstance(value, list):
        return [_typed(each, kind, path, reading) for each in value]
    convert = _CONVERSIONS.get(kind)
    made = value if convert is None else convert(value)
    if made is None or (made == value and isinstance(made, bool) == isinstance(value, bool)):
        return value if made is None else made
    word = str(made).lower()
    what = "the text " if isinstance(value, str) else ""
    shown = str(value).lower() if isinstance(value, bool) else quoted(value)
    note = (path, f"{what}{shown} is read as {word}: write {word}")
    if note not in reading.notes[-3:]:
        reading.notes.append(note)
    return made


def _switch(value: Any) -> bool | None:
    word = value.lower() if isinstance(value, str) and len(value) <= _LONGEST else ""
    return True if word in _YES else False if word in _NO else None


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str) or len(value) > _LONGEST:
        return None
    if value.lower() in _YAML_BOOLEANS:
        return _YAML_BOOLEANS[value.lower()]
    if not _NUMBER.fullmatch(value.strip()):
        return None
    number = float(value.replace("_", ""))
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _whole(value: Any) -> int | None:
    number = float(value) if isinstance(value, float) and math.isfinite(value) else _number(value)
    return int(number) if number is not None and float(number).is_integer() else None


_CONVERSIONS: Mapping[type, Callable[[Any], Any]] = {bool: _switch, float: _number, int: _whole}
