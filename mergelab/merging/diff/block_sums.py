"""Sums over the entries of one tensor of several models: what norms, cosines and distances are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["PIECE", "SMALL", "Summing", "Sums", "computing_dtype", "with_changes"]

SMALL = 1e-3
"""Size of a change below which entries are counted."""

_RUN = 1024
"""Products that are added in float32 before their sum goes on in float64."""

PIECE = 1 << 16
"""Entries computed on at a time: a few arrays of them stay in a core's cache."""


@dataclass(frozen=True)
class Sums:
    """Sums over (a part of) one tensor.

    Its vectors are the reference `r`, the changes `m - r` of the other models in order, and, where the two
    models that are compared first are both other ones, their difference. No distance is then a small
    difference of large numbers.

    Attributes:
        count: Number of entries.
        gram: float64 `[vectors, vectors]`, inner products; NaN where entries are not finite.
        unchanged: int64 `[vectors]`, entries that are exactly zero; of the reference's none are counted.
        small: int64 `[vectors]`, entries of magnitude below 1e-3, likewise.
        nonfinite: int64 `[models]`, entries that are NaN or infinite, of each model in the order of models.
        row_norms: float64 `[vectors, rows]`, norms of rows where these belong to tokens; else `[vectors, 0]`.
    """

    count: int
    gram: np.ndarray
    unchanged: np.ndarray
    small: np.ndarray
    nonfinite: np.ndarray
    row_norms: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        """The sums over both parts, of which `other` follows."""
        return Sums(
            self.count + other.count,
            self.gram + other.gram,
            self.unchanged + other.unchanged,
            self.small + other.small,
            self.nonfinite + other.nonfinite,
            np.concatenate([self.row_norms, other.row_norms], axis=1),
        )


def computing_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype in which tensors of these dtypes are subtracted: float32 where it holds them."""
    exact = all(d.kind not in "iuf" or d.itemsize <= 2 or d == np.float32 for d in dtypes)
    return np.dtype(np.float32 if exact else np.float64)


def with_changes(models: np.ndarray, reference: int, *, pair: bool) -> np.ndarray:
    """`[vectors, n]` of `[models, n]`: the reference, the others' changes, and the first two's difference."""
    others = [i for i in range(len(models)) if i != reference]
    found = [models[reference], *(models[i] - models[reference] for i in others)]
    return np.stack([*found, models[0] - models[1]] if pair else found)


class Summing:
    """Adds up the pieces of one tensor; keeps its scratch memory, so that each thread has one of its own.

    Args:
        models: Number of models.
        reference: Index of the reference among them.
        pair: Whether the difference of the first two models is a vector of its own.
        dtype: Dtype to compute in.
        piece: Entries of the largest piece.
    """

    def __init__(
        self, models: int, reference: int, *, pair: bool, dtype: np.dtype, piece: int = PIECE
    ) -> None:
        self.order = [reference, *(i for i in range(models) if i != reference)]
        self.pair, self.dtype = pair, dtype
        self.vectors = models + pair
        self._found = np.empty((self.vectors, piece), dtype)
        self._flags = np.empty(piece, bool)
        self._small = dtype.type(SMALL)
        self.begin()

    def begin(self) -> None:
        """Forgets what was added."""
        self._count = 0
        self._gram = np.zeros((self.vectors, self.vectors))
        self._unchanged = [0] * self.vectors
        self._below = [0] * self.vectors
        self._nonfinite = np.zeros(len(self.order), np.int64)
        self._rows: list[np.ndarray] = []

    def add(self, values: Sequence[np.ndarray], width: int = 0) -> None:
        """Adds a piece.

        Args:
            values: Entries of each model, in the order of the models, at most those of the largest piece.
            width: Length of the rows whose norms are kept; 0 for none.
        """
        n = values[0].size
        found, flags = self._found[:, :n], self._flags[:n]
        for row, i in zip(found, self.order, strict=False):
            row[...] = values[i]
        with np.errstate(all="ignore"):
            if self.pair:
                first, second = (self.order.index(i) for i in (0, 1))
                np.subtract(found[first], found[second], out=found[-1])
            for change in found[1 : len(self.order)]:
                np.subtract(change, found[0], out=change)
            gram = _products(found)
            if not math.isfinite(gram.sum()):
                odd = [n - np.count_nonzero(np.isfinite(own.astype(self.dtype))) for own in values]
                self._nonfinite += odd
                if not any(odd):  # squares that leave the range of float32
                    gram = _products(found.astype(np.float64))
            self._gram += gram
            self._count += n
            if width:
                shaped = found.reshape(self.vectors, -1, width)
                self._rows.append(np.sqrt(np.vecdot(shaped, shaped), dtype=np.float64))
            for i in range(1, self.vectors):
                size = np.abs(found[i], out=found[i])  # no longer needed with its signs
                self._unchanged[i] += int(np.count_nonzero(np.equal(size, 0, out=flags)))
                self._below[i] += int(np.count_nonzero(np.less(size, self._small, out=flags)))

    def sums(self) -> Sums:
        """The sums over all that was added."""
        rows = np.concatenate(self._rows, axis=1) if self._rows else np.zeros((self.vectors, 0))
        unchanged, small = (np.array(each, np.int64) for each in (self._unchanged, self._below))
        return Sums(self._count, self._gram, unchanged, small, self._nonfinite, rows)


def _products(found: np.ndarray) -> np.ndarray:
    """Inner products of rows, added in float64 beyond runs of 1,024 products.

    A run is short enough for the BLAS to stay in its caller's thread.
    """
    vectors, n = found.shape
    whole = n // _RUN * _RUN
    runs = found[:, :whole].reshape(vectors, -1, _RUN)
    gram = np.empty((vectors, vectors))
    for i in range(vectors):
        for j in range(i + 1):
            total = float(np.add.reduce(np.vecdot(runs[i], runs[j]), dtype=np.float64))
            if whole < n:
                total += float(np.vecdot(found[i, whole:], found[j, whole:]))
            gram[i, j] = gram[j, i] = total
    return gram
