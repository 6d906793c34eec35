"""Rows with a block number left open, and how they become the table of leaves of one configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mergelab.models.declaration import Leaf, Transform

__all__ = ["Parameter", "Parameters", "Row", "build_table", "linear_rows"]


class Parameter(NamedTuple):
    """What a leaf is: its shape, and the logical name of each axis (None: never split)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


Parameters = dict[tuple[str, ...], Parameter]


class Row(NamedTuple):
    """One row of a family's table, for all blocks at once.

    Attributes:
        path: the leaf's path, joined by dots; `{i}` stands for the number of the block.
        hf_name: the HF tensor's name, with the same `{i}`; `{e}` for the number of the expert.
        transform: as in `Leaf`.
    """

    path: str
    hf_name: str
    transform: Transform = "identity"


def linear_rows(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Row]:
    """The kernel and the bias of linear layers that are torch `Linear` modules in HF.

    Args:
        ours: what stands before the names here.
        theirs: what stands before them in HF.
        names: our layers' names to HF's.
    """
    for name, hf_name in names.items():
        yield Row(f"{ours}.{name}.kernel", f"{theirs}.{hf_name}.weight", "transpose")
        yield Row(f"{ours}.{name}.bias", f"{theirs}.{hf_name}.bias")


def build_table(rows: Iterable[Row], parameters: Parameters, blocks: int) -> tuple[Leaf, ...]:
    """One leaf for every parameter of a configuration; rows of parameters it does not have fall away.

    The order is the rows' order, all rows of block 0 before those of block 1.

    Raises:
        ValueError: a parameter has no row.
    """
    rows = list(rows)
    first = next((n for n, row in enumerate(rows) if "{i}" in row.path), len(rows))
    before, per_block = rows[:first], [row for row in rows if "{i}" in row.path]
    after = [row for row in rows[first:] if "{i}" not in row.path]
    numbered = [(row, i) for i in range(blocks) for row in per_block]
    leaves = []
    for row, i in [*((row, 0) for row in before), *numbered, *((row, 0) for row in after)]:
        path = tuple(row.path.replace("{i}", str(i)).split("."))
        if path not in parameters:
            continue
        shape, axes = parameters[path]
        name = row.hf_name.replace("{i}", str(i))
        stack = shape[0] if "{e}" in name else 0
        leaves.append(Leaf(path, name.replace("{e}", "{}"), shape, row.transform, axes, stack))
    missing = parameters.keys() - {leaf.path for leaf in leaves}
    if missing:
        raise ValueError(f"the family's table has no row for the parameter {'.'.join(min(missing))!r}")
    return tuple(leaves)
