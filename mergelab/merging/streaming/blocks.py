"""Cuts a tensor into blocks of nearly fixed size, so that memory is bounded and compiled programs are few."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mergelab.operators.algebra import Granularity

__all__ = ["BLOCK_ELEMENTS", "LANES", "Block", "blocks_of", "fold"]

BLOCK_ELEMENTS = 2**21
"""Elements per block. A constant, not a setting: partial sums are taken per block, so results are the same
bytes whatever the memory budget or the number of threads."""

LANES = 1024
"""The row length flat tensors are folded to; sums run down the columns, which keeps vector units busy."""


_FEWEST_ROWS = 256


@dataclass(frozen=True)
class Block:
    """Elements `[start, start + count)` of a tensor, computed on as a 2-D array padded with zeros.

    Attributes:
        start: flat index of the first element.
        count: number of real elements.
        shape: `[rows, columns]` with `rows * columns >= count`.
    """

    start: int
    count: int
    shape: tuple[int, int]


def fold(shape: tuple[int, ...], grain: Granularity) -> tuple[int, int]:
    """The 2-D view in which a tensor is cut into groups of rows.

    `element`: rows of `LANES`, the last one perhaps partial; `row`: the last axis;
    `column`: all but the first.
    """
    size = math.prod(shape)
    if grain == "row":
        columns = shape[-1] if shape else 1
    elif grain == "column":
        columns = size // shape[0] if len(shape) > 1 else 1
    else:
        columns = LANES
    return -(-size // columns), columns


def blocks_of(shape: tuple[int, ...], grain: Granularity) -> tuple[Block, ...]:
    """All blocks of a tensor, in order; empty for a tensor without elements."""
    size = math.prod(shape)
    if size == 0:
        return ()
    rows, columns = fold(shape, grain)
    per_block = max(1, BLOCK_ELEMENTS // columns)
    return tuple(_cut(size, rows, columns, per_block))


def _cut(size: int, rows: int, columns: int, per_block: int) -> Iterator[Block]:
    for first in range(0, rows, per_block):
        taken = min(per_block, rows - first)
        start = first * columns
        count = min(taken * columns, size - start)
        padded = taken if taken == per_block else min(per_block, _rounded_up(taken))
        yield Block(start, count, (padded, columns))


def _rounded_up(rows: int) -> int:
    """The next power of two, at least 256: every further shape is one more program to trace and compile."""
    return max(_FEWEST_ROWS, 1 << (rows - 1).bit_length())
