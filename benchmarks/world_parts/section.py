"""What a section of benchmarks/world.md is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Section"]


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        note: sentence above the table: what was compared with what.
        head: names of the columns.
        rows: cells, as text.
    """

    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
