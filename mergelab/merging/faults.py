"""Where a fault of a recipe is, and the one sentence that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergelab.errors import RecipeError, dotted

__all__ = ["FieldPath", "LocatedError", "Origin", "dotted", "raise_faults"]

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read from; takes no part in comparisons between recipes.

    Attributes:
        source: the file's name for messages, or None for a recipe built in Python.
        path: the file, or None.
        lines: the 1-based line of each field.
    """

    source: str | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)
    lines: Mapping[FieldPath, int] = field(default_factory=dict, compare=False)

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
