"""Codes times scales: `(code - zero point) * scale`, where a block of codes shares scale and zero point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergelab.checkpoints.quantized.box_source import BoxSource
from mergelab.checkpoints.quantized.codes import Matrix
from mergelab.checkpoints.source import TensorSource

__all__ = ["Blocks", "ScaledTensor", "block_length"]

_USUAL = 128
"""Block length of DeepSeek-V3, Qwen3 and compressed-tensors, where neither config nor shapes tell it."""


def block_length(size: int, count: int, stated: int | None) -> int | None:
    """How many of `size` codes share one of `count` scales along an axis; None if these do not fit.

    The last block may be ragged. What the config states counts where it fits; else the usual length does, and
    else equal blocks.
    """
    if count in (1, size):
        return size // count if count else None
    for length in (stated, _USUAL):
        if length is not None and length > 0 and -(-size // length) == count:
            return length
    return size // count if count > 0 and size % count == 0 else None


@dataclass(frozen=True)
class Blocks:
    """Numbers that hold for blocks of a matrix, such as scales.

    Attributes:
        cells: One number per block.
        shape: Blocks along the rows and the columns.
        length: Rows and columns of a block; the last ones may have fewer.
        groups: Number of the block of each column, where these are not in order (`g_idx`); int32 or int64.
    """

    cells: Matrix
    shape: tuple[int, int]
    length: tuple[int, int]
    groups: TensorSource | None = None

    def combine(
        self,
        operation: np.ufunc,
        values: np.ndarray,
        matrix: int,
        rows: range,
        columns: range,
        prepare: Callable[[np.ndarray], np.ndarray] = lambda cells: cells,
    ) -> None:
        """Replaces a box of values by `operation(values, number of their block)`.

        Args:
            operation: Such as `np.multiply`.
            values: Float32 `[rows, columns]`.
            matrix: Number of the matrix the box is of.
            rows: Its rows.
            columns: Its columns.
            prepare: What to make of the numbers first.
        """
        tall, wide = self.length
        down = range(rows.start // tall, (rows.stop - 1) // tall + 1)
        if self.groups is None:
            along = range(columns.start // wide, (columns.stop - 1) // wide + 1)
            place = np.arange(columns.start, columns.stop) // wide - along.start
        else:
            along, place = self._places(columns)
        cells = prepare(np.ascontiguousarray(self.cells.box(matrix, down, along)))
        whole = self.groups is None and columns.start % wide == 0 and len(columns) % wide == 0
        if len(along) > 1 and wide > 1 and whole and values.flags.c_contiguous:
            values, cells = values.reshape(len(rows), -1, wide), cells[:, :, None]
        elif len(along) > 1 and (wide > 1 or self.groups is not None):
            cells = cells[:, place]
        if len(down) == 1 or tall == 1:
            operation(values, cells, out=values)
            return
        for number, block in enumerate(down):
            first = max(block * tall, rows.start) - rows.start
            last = min((block + 1) * tall, rows.stop) - rows.start
            operation(values[first:last], cells[number], out=values[first:last])

    def _places(self, columns: range) -> tuple[range, np.ndarray]:
        """The groups that columns are of, and which of these each is of."""
        assert self.groups is not None
        found = np.empty(len(columns), self.groups.dtype)
        self.groups.read_into(columns.start, found)
        along = range(int(found.min()), int(found.max()) + 1)
        return along, found - along.start


@dataclass(frozen=True, eq=False)
class ScaledTensor(BoxSource):
    """`(code - zero) * scale`, computed in float32 in this order.

    Attributes:
        codes: Codes, in rows and columns of the true tensor.
        scale: Scales of blocks.
        zero: Zero points of blocks; None for symmetric codes.
        factor: Number that the product is multiplied with in the end; None for 1.
        outer: Number that each scale is multiplied with before it is used; None for 1.
        divisor: Number that each scale is divided by before it is used; None for 1.
    """

    codes: Matrix
    scale: Blocks
    zero: Blocks | None = None
    factor: np.float32 | None = None
    outer: np.float32 | None = None
    divisor: np.float32 | None = None

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        values = self.codes.box(matrix, rows, columns)
        if self.zero is not None:
            self.zero.combine(np.subtract, values, matrix, rows, columns)
        self.scale.combine(np.multiply, values, matrix, rows, columns, self._prepared)
        if self.factor is not None:
            values *= self.factor
        return values

    def _prepared(self, scale: np.ndarray) -> np.ndarray:
        if self.outer is not None:
            scale = scale * self.outer
        return scale if self.divisor is None else scale / self.divisor
