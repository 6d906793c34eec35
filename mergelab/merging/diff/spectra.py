"""Singular spectra of changes: effective rank, and how much of the energy few directions hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.source import TensorSource

__all__ = ["RANKS", "Spectrum", "spectrum_of_change"]

RANKS = (1, 4, 16, 64, 256)
"""Numbers of directions whose share of the energy is told."""

_ROWS = 1 << 22  # entries of a block of rows


@dataclass(frozen=True)
class Spectrum:
    """The singular values `s` of a change.

    Attributes:
        rank: Most directions the change could have: its smaller side.
        effective_rank: `exp(-sum p ln p)` with `p = s / sum s` (Roy and Vetterli, 2007).
        stable_rank: `sum s^2 / max s^2`.
        rank_90, rank_99: Directions that hold so many percent of `sum s^2`.
        largest: The largest singular value.
        energy: Fraction of `sum s^2` in the first k directions, by k.
    """

    rank: int
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int
    largest: float
    energy: dict[int, float]

    @classmethod
    def of_squares(cls, squares: np.ndarray) -> Spectrum:
        """The summary of squared singular values, in any order.

        Example:
            >>> Spectrum.of_squares(np.ones(8)).effective_rank
            8.0
        """
        ordered = np.sort(np.maximum(squares, 0))[::-1]
        total = float(ordered.sum())
        if not total > 0:
            return cls(ordered.size, 0.0, 0.0, 0, 0, 0.0, {k: 0.0 for k in RANKS if k <= ordered.size})
        # Of products in float64 what is below 1e-15 of the largest is rounding.
        ordered[ordered < ordered[0] * ordered.size * 2.3e-16] = 0
        shares = np.cumsum(ordered) / total
        values = np.sqrt(ordered)
        p = values[values > 0] / values.sum()
        return cls(
            ordered.size,
            round(float(np.exp(-np.sum(p * np.log(p)))), 9),
            total / float(ordered[0]),
            int(np.searchsorted(shares, 0.9 - 1e-12)) + 1,
            int(np.searchsorted(shares, 0.99 - 1e-12)) + 1,
            float(values[0]),
            {k: min(1.0, float(shares[k - 1])) for k in RANKS if k <= ordered.size},
        )


def spectrum_of_change(tuned: TensorSource, base: TensorSource) -> Spectrum | None:
    """The spectrum of `tuned - base`, two matrices; None where they hold NaN or infinity.

    Squares of the singular values are eigenvalues of the smaller Gram matrix, in float64: exact to about 1e-8
    of the largest singular value. Memory is that of the Gram matrix and a block of rows; where there are
    more columns than rows, of the change in float32 too.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    rows, columns = base.shape
    if rows == 0 or columns == 0:
        return Spectrum.of_squares(np.zeros(0))
    gram = _by_rows(tuned, base) if rows >= columns else _by_columns(tuned, base)
    if not np.isfinite(gram).all():
        return None
    return Spectrum.of_squares(np.linalg.eigvalsh(gram))


def _by_rows(tuned: TensorSource, base: TensorSource) -> np.ndarray:
    rows, columns = base.shape
    gram = np.zeros((columns, columns))
    step = max(1, _ROWS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        pieces = [np.empty(count * columns, source.dtype) for source in (tuned, base)]
        for source, piece in zip((tuned, base), pieces, strict=True):
            source.read_into(first * columns, piece)
        new, old = (piece.reshape(count, columns).astype(np.float64) for piece in pieces)
        new -= old
        gram += new.T @ new
    return gram


def _by_columns(tuned: TensorSource, base: TensorSource) -> np.ndarray:
    rows, columns = base.shape
    wide = np.float64 if np.float64 in (tuned.dtype, base.dtype) else np.float32
    change = read_whole(tuned).astype(wide)
    change -= read_whole(base).astype(wide)
    gram = np.zeros((rows, rows))
    step = max(1, _ROWS // rows)
    for first in range(0, columns, step):
        block = change[:, first : first + step].astype(np.float64)
        gram += block @ block.T
    return gram
