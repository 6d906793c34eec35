"""Takes a direction out of a stored matrix block by block, in either layout, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergelab.checkpoints import TensorSource
from mergelab.errors import NonFiniteError
from mergelab.interp.abliteration.weights import KeepNorms

__all__ = ["BLOCK", "edited_blocks"]

BLOCK = 1 << 22
"""Elements that are worked on at a time, whatever the size of the matrix (a row at least)."""


def edited_blocks(
    source: TensorSource,
    direction: np.ndarray,
    weight: float,
    *,
    axis: int,
    keep_norms: KeepNorms = None,
    block: int = BLOCK,
) -> Iterator[tuple[int, np.ndarray]]:
    """The pieces of the edited matrix, in order: what `orthogonalise` makes of it, rounded once.

    Where a vector that is written lies across the rows of the file (a torch `Linear`, `[width, in]`), or
    norms run over all rows, the matrix is read twice or thrice: for the sums, and to edit.

    Args:
        source: `[in, width]`, `[width, in]`, or a bias `[width]`.
        direction: float32 `[width]`, of length 1 (or 0).
        weight: the share of it to remove.
        axis: the axis of `source` that runs over the residual stream.
        keep_norms: as in `orthogonalise`.
        block: elements to work on at a time.

    Yields:
        The first element, and the flat elements from there on, in the source's dtype.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity, or an edited value leaves the range of its dtype.
    """
    if len(source.shape) == 1:
        rows, columns, axis, keep_norms = 1, source.shape[0], 1, None
    else:
        rows, columns = source.shape
    step = max(block // max(columns, 1), 1)
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    across = axis == 0
    along = np.zeros(columns)
    old, new = np.zeros(columns), np.zeros(columns)

    def read(start: int, stop: int) -> np.ndarray:
        piece = np.empty((stop - start) * columns, source.dtype)
        source.read_into(start * columns, piece)
        return piece.reshape(stop - start, columns).astype(np.float32)

    def without(x: np.ndarray, start: int, stop: int) -> np.ndarray:
        if across:
            return x - np.float32(weight) * np.outer(direction[start:stop], along.astype(np.float32))
        return x - np.float32(weight) * np.outer(x @ direction, direction)

    over_rows = keep_norms == ("written" if across else "coordinate")
    if across:
        for start, stop in ranges:
            along += direction[start:stop] @ read(start, stop)
    if over_rows:
        for start, stop in ranges:
            x = read(start, stop)
            old += np.square(x, dtype=np.float64).sum(axis=0)
            new += np.square(without(x, start, stop), dtype=np.float64).sum(axis=0)
    for start, stop in ranges:
        x = read(start, stop)
        edited = without(x, start, stop)
        if over_rows:
            edited *= _factor(np.sqrt(old), np.sqrt(new))[None]
        elif keep_norms is not None:
            edited *= _factor(*(np.linalg.norm(y, axis=1) for y in (x, edited)))[:, None]
        with np.errstate(over="ignore"):
            rounded = edited.astype(source.dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise NonFiniteError(
                f"tensor {source.name!r} holds NaN, infinity or values its dtype cannot hold once edited; "
                "repair the model, or store it as bfloat16 or float32 first."
            )
        yield start * columns, rounded.reshape(-1)


def _factor(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What restores norms; what lay wholly in the direction has none to restore."""
    kept = new > 1e-6 * old
    return np.where(kept, old / np.where(kept, new, 1.0), 1.0).astype(np.float32)
