"""Tensors whose elements are computed from what is stored, a box of rows and columns at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece, read_runs
from mergelab.checkpoints.source import TensorSource

__all__ = ["BOX", "BoxSource", "Transposed", "read_box"]

BOX = 1 << 20
"""Elements computed at once: what is held beside a piece that is read stays within some 30 MB."""

_PAGE = 4096
_WINDOW = 4 << 20


@dataclass(frozen=True, eq=False)
class BoxSource(ABC):
    """A `TensorSource` in float32 that is computed; its last two axes are rows and columns.

    Attributes:
        name: Plain name of the tensor, such as `model.layers.0.mlp.up_proj.weight`.
        shape: True shape.
        form: Stored format in words, such as `float8_e4m3fn in blocks of 128 x 128`.
        parts: Stored tensors that it is computed from.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    parts: tuple[TensorSource, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Always float32."""
        return np.dtype(np.float32)

    @abstractmethod
    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        """Elements of some rows and columns of one matrix of the stack, float32 `[rows, columns]`.

        Args:
            matrix: Number of the matrix among those of the leading axes; 0 where there are none.
            rows: Rows, at least one.
            columns: Columns, at least one.

        Raises:
            CheckpointError: the file is shorter than its header says, has changed, or cannot be read.
        """

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, float32) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the file is shorter than its header says, has changed, or cannot be read.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        check_piece(self, math.prod(self.shape), start, out)
        count, width = (1, 1, *self.shape)[-2:]
        done = 0
        while done < out.size:
            row, column = divmod(start + done, width)
            rest = out.size - done
            if column or rest < width or width > BOX:
                height, length = 1, min(width - column, rest, BOX)
            else:
                height, length = min(rest // width, count - row % count, BOX // width), width
            rows = range(row % count, row % count + height)
            piece = out[done : done + height * length].reshape(height, length)
            piece[...] = self.box(row // count, rows, range(column, column + length))
            done += height * length


@dataclass(frozen=True, eq=False)
class Transposed(BoxSource):
    """Another box source with its last two axes exchanged."""

    inner: BoxSource

    @classmethod
    def of(cls, inner: BoxSource) -> Transposed:
        """The same values, rows and columns exchanged."""
        shape = (*inner.shape[:-2], inner.shape[-1], inner.shape[-2])
        return cls(inner.name, shape, inner.form, inner.parts, inner)

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        return self.inner.box(matrix, columns, rows).T


def read_box(source: TensorSource, width: int, rows: range, columns: range) -> np.ndarray:
    """Elements of a stored tensor seen as rows of `width` elements, in its own dtype, `[rows, columns]`.

    Raises:
        CheckpointError: the file is shorter than its header says, has changed, or cannot be read.
    """
    out = np.empty((len(rows), len(columns)), source.dtype)
    if len(columns) == width:
        source.read_into(rows.start * width, out.reshape(-1))
    elif (width - len(columns)) * source.dtype.itemsize < _PAGE:  # gaps that are read as a whole anyway
        step = max(1, _WINDOW // (width * source.dtype.itemsize))
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            whole = np.empty(count * width, source.dtype)
            source.read_into(first * width, whole)
            part = whole.reshape(count, width)[:, columns.start : columns.stop]
            out[first - rows.start : first - rows.start + count] = part
    else:
        read_runs(source, np.arange(rows.start, rows.stop, dtype=np.int64) * width + columns.start, out)
    return out
