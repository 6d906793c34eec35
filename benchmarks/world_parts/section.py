"""What a section of benchmarks/world.md is given, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place", "Section"]


@dataclass(frozen=True)
class Place:
    """Where a section works, and how often it measures.

    Attributes:
        work: empty scratch folder of its own.
        environments: folder of the virtual environments that it makes, or finds there from an earlier run.
        turns: turns of each pair of programs that are timed.
    """

    work: Path
    environments: Path
    turns: int = 3


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
