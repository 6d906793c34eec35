"""A tensor whose rows are re-ordered, borrowed, averaged or zero, read in flat pieces like any other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.source import TensorSource
from mergelab.merging.vocabulary.rows import Row, RowMap

__all__ = ["RowSource"]

_COMPUTED = -1
_BLOCK = 1 << 20  # elements read at a time when averaging all rows


class RowSource:
    """`own` with its rows laid out by a `RowMap`; reads only the rows that a piece touches.

    Rows of neighbouring places are read in one go. A mean is taken in float32 and rounded once; a row from a
    tensor of another dtype is rounded to this one's.
    """

    def __init__(self, own: TensorSource, rows: RowMap, others: Mapping[str, TensorSource | None]) -> None:
        """Builds the virtual tensor.

        Args:
            own: the model's tensor, `[own rows, *row shape]`.
            rows: its layout.
            others: for each other model named in `rows.elsewhere`, its tensor of the same row shape, or None
                where its rows count as zeros (a bias it does not have).
        """
        self._own = own
        self._rows = rows
        self._width = int(np.prod(own.shape[1:], dtype=np.int64))
        self._tensors: list[TensorSource | None] = [own, *others.values()]
        self._number = {rows.model: 0, **{model: i + 1 for i, model in enumerate(others)}}
        self._place = np.where(rows.index >= 0, 0, _COMPUTED).astype(np.int32)
        self._row = rows.index.copy()
        for output_row, row in rows.elsewhere.items():
            if len(row) == 1 and self._row[output_row] < 0:
                model, self._row[output_row] = row[0]
                self._place[output_row] = self._number[model]
        self._lock = threading.Lock()
        self._padding_row: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self._own.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows.index.size, *self._own.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._own.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with the flat elements `[start, start + out.size)` of the re-ordered tensor."""
        check_piece(self, self._rows.index.size * self._width, start, out)
        if not out.size:
            return
        first, last = start // self._width, (start + out.size - 1) // self._width
        for begin, end in self._runs(first, last + 1):
            low, high = max(begin * self._width, start), min(end * self._width, start + out.size)
            piece = out[low - start : high - start]
            if self._place[begin] == _COMPUTED:
                offset = low - begin * self._width
                piece[...] = self._computed(begin)[offset : offset + piece.size]
            else:
                shift = (int(self._row[begin]) - begin) * self._width
                self._copy(int(self._place[begin]), low + shift, piece)

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Splits output rows `[begin, end)` where the rows to read stop being neighbours."""
        place, row = self._place[begin:end], self._row[begin:end]
        together = (place[1:] == place[:-1]) & (row[1:] == row[:-1] + 1) & (place[1:] != _COMPUTED)
        edges = [0, *(np.flatnonzero(~together) + 1).tolist(), end - begin]
        for i, j in pairwise(edges):
            yield begin + i, begin + j

    def _copy(self, place: int, start: int, out: np.ndarray) -> None:
        tensor = self._tensors[place]
        if tensor is None:
            out[...] = 0
        elif tensor.dtype == out.dtype:
            tensor.read_into(start, out)
        else:
            buffer = np.empty(out.size, tensor.dtype)
            tensor.read_into(start, buffer)
            out[...] = buffer.astype(np.float32).astype(out.dtype)

    def _computed(self, output_row: int) -> np.ndarray:
        """One row that no tensor holds, in this tensor's dtype."""
        if output_row >= self._rows.padding:
            return self._padding()
        return self._mean(self._rows.elsewhere.get(output_row, ()))

    def _mean(self, row: Row) -> np.ndarray:
        total = np.zeros(self._width, np.float32)
        for model, index in row:
            tensor = self._tensors[self._number[model]]
            if tensor is not None:
                buffer = np.empty(self._width, tensor.dtype)
                tensor.read_into(index * self._width, buffer)
                total += buffer.astype(np.float32)
        return (total / np.float32(max(len(row), 1))).astype(self.dtype)

    def _padding(self) -> np.ndarray:
        """The mean of all rows before the padding: one pass over the tensor, at the first need."""
        with self._lock:
            padding_row = self._padding_row
            if padding_row is None:
                total = np.zeros(self._width, np.float64)
                step = max(1, _BLOCK // self._width)
                for begin in range(0, self._rows.padding, step):
                    end = min(begin + step, self._rows.padding)
                    block = np.empty((end - begin) * self._width, self.dtype)
                    self.read_into(begin * self._width, block)
                    total += block.reshape(-1, self._width).astype(np.float32).sum(axis=0, dtype=np.float64)
                mean = (total / max(self._rows.padding, 1)).astype(np.float32)
                padding_row = self._padding_row = mean.astype(self.dtype)
            return padding_row
