"""Codes times scales: `(code - zero point) * scale`, where a block of codes shares scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.checkpoints.file_tensor import read_runs
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

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        """The numbers of some rows and columns, float32, of a shape that broadcasts to `[rows, columns]`."""
        down = range(rows.start // self.length[0], (rows.stop - 1) // self.length[0] + 1)
        if self.groups is None:
            along = range(columns.start // self.length[1], (columns.stop - 1) // self.length[1] + 1)
            place = np.arange(columns.start, columns.stop) // self.length[1] - along.start
        else:
            found = np.empty((1, len(columns)), self.groups.dtype)
            read_runs(self.groups, [columns.start], found)
            along = range(int(found.min()), int(found.max()) + 1)
            place = found[0] - along.start
        cells = self.cells.box(matrix, down, along)
        if len(along) > 1:
            cells = cells[:, place]
        if len(down) > 1 and self.length[0] > 1:
            cells = cells[np.arange(rows.start, rows.stop) // self.length[0] - down.start]
        return cells


@dataclass(frozen=True)
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
            values -= self.zero.box(matrix, rows, columns)
        scale = self.scale.box(matrix, rows, columns)
        if self.outer is not None:
            scale = scale * self.outer
        if self.divisor is not None:
            scale = scale / self.divisor
        values *= scale
        if self.factor is not None:
            values *= self.factor
        return values
