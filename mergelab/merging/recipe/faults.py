"""Where a fault of a recipe is, and the one sentence that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mergelab.errors import RecipeError, did_you_mean, dotted, quoted, shortened

__all__ = ["FieldPath", "LocatedError", "Origin", "dotted", "field_faults", "raise_faults"]


FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read from; takes no part in comparisons between recipes.

    Attributes:
        source: the file's name for messages, or None for a recipe built in Python.
        path: the file, or None.
        lines: the 1-based line of each field.
        notes: how the recipe is read where it is not quite one, a sentence each, for a plan's warnings.
    """

    source: str | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)
    lines: Mapping[FieldPath, int] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def folder(self) -> Path | None:
        """The file's folder, against which relative model paths are resolved second."""
        return None if self.path is None else self.path.parent

    def line(self, path: FieldPath) -> int:
        """The line of the field at `path` or of the nearest one around it; 0 if none is known."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 0)

    def sentence(self, path: FieldPath, message: str) -> str:
        """`file.yaml:12: models[1].model: message`, with as much of the place as is known."""
        place = "" if self.source is None else f"{self.source}:"
        line = self.line(path)
        if place and line:
            place += f"{line}:"
        parts = (place, f"{dotted(path)}:" if path else "", message)
        return " ".join(part for part in parts if part)


class LocatedError(RecipeError):
    """A `RecipeError` that keeps each fault's path, so that a reader of files can add line numbers."""

    def __init__(self, located: Iterable[tuple[FieldPath, str]]) -> None:
        self.located = tuple(located)
        super().__init__(Origin().sentence(path, message) for path, message in self.located)


def raise_faults(sentences: Iterable[str]) -> None:
    """Raises one `RecipeError` with every distinct sentence, if there is any."""
    faults = list(dict.fromkeys(sentences))
    if faults:
        raise RecipeError(faults)


_EXPLAINED = 500

_EXPECTED = {
    "string_type": "a word",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
}


def field_faults(error: ValidationError, data: Any, root: type[BaseModel]) -> list[tuple[FieldPath, str]]:
    """`(path, message)` of each error; `data` is what was validated as a `root`."""
    details = [detail for detail in error.errors(include_url=False) if not _is_consequence(detail)]
    # Far more than are shown: the rest are counted, and looking for what was meant takes its time.
    return [
        _fault(detail, data, root)
        if i < _EXPLAINED
        else (_data_path(detail["loc"], data), "is not what is expected here")
        for i, detail in enumerate(details)
    ]


def _is_consequence(detail: Any) -> bool:
    """Whether a list is called too short only because entries of it are faulty, which is said of them."""
    found = detail.get("input")
    return detail["type"] == "too_short" and isinstance(found, list | tuple) and len(found) >= _count(detail)


def _fault(detail: Any, data: Any, root: type[BaseModel]) -> tuple[FieldPath, str]:
    path = _data_path(detail["loc"], data)
    kind: str = detail["type"]
    found = detail.get("input")
    if kind == "extra_forbidden":
        return path, f"unknown key{did_you_mean(str(path[-1]), _fields_at(path[:-1], root))}"
    if kind == "missing":
        return path, "is missing"
    if kind == "literal_error":
        choices = detail["ctx"]["expected"].replace(" or ", ", ")
        word = found if isinstance(found, str) else ""
        near = did_you_mean(word, [c.strip("' ") for c in choices.split(",")])
        return path, f"expected one of {choices}, found {quoted(found)}{near}"
    if kind == "value_error":
        return path, shortened(str(detail["ctx"]["error"]), 600)
    if kind in ("too_short", "too_long"):
        return path, f"expected {'at least' if kind == 'too_short' else 'at most'} {_count(detail)} entries"
    if kind in _EXPECTED:
        hint = " (in YAML 1.2 it is a word: write true or false)" if _is_old_boolean(kind, found) else ""
        return path, f"expected {_EXPECTED[kind]}, found {quoted(found)}{hint}"
    return path, f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, found {quoted(found)}"


def _count(detail: Any) -> int:
    context = detail["ctx"]
    return context.get("min_length", context.get("max_length", 0))


def _is_old_boolean(kind: str, found: Any) -> bool:
    return kind == "bool_type" and isinstance(found, str) and found.lower() in ("yes", "no", "on", "off")


def _data_path(location: tuple[str | int, ...], data: Any) -> FieldPath:
    """The location without the union tags pydantic puts between the data's own keys."""
    path: list[str | int] = []
    here = data
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(here, BaseModel):
            here = {name: getattr(here, name) for name in type(here).model_fields}
        if isinstance(here, Mapping):
            if part in here or last:
                path.append(part)
                here = here.get(part)  # type: ignore[arg-type]
        elif isinstance(part, int):
            path.append(part)
            here = here[part] if isinstance(here, list | tuple) and part < len(here) else None
    return tuple(path)


def _fields_at(path: FieldPath, root: type[BaseModel]) -> list[str]:
    """The field names of the part at `path` of a `root`, by walking the annotations."""
    here: Any = root
    for part in path:
        field = here.model_fields.get(str(part))
        here = here if field is None else _model_in(field.annotation)  # a list index or a free key: same part
        if here is None:
            return []
    return list(here.model_fields)


def _model_in(annotation: Any) -> Any:
    """The first recipe part inside an annotation such as `tuple[InputModel, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)
