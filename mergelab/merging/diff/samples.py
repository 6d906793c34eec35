"""Values of a tensor taken from all over it: histograms of changes, and signs that disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergelab.checkpoints.file_tensor import read_runs
from mergelab.checkpoints.source import TensorSource
from mergelab.merging.diff.pairs import MatchedTensor

__all__ = ["DENSITIES", "EDGES", "change_shares", "sample_models", "sign_conflict"]

_RUN = 1024
_LOWEST, _HIGHEST = -30, 3

EDGES = (0.0, *(2.0**power for power in range(_LOWEST, _HIGHEST + 1)))
"""Bounds of the histogram's bins; the first holds what is smaller, zeros among it, and the last the rest."""

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Fractions of a task vector's entries, the largest ones, whose signs are compared."""


def sample_models(tensor: MatchedTensor, count: int) -> np.ndarray:
    """`[models, n]` with n = about `count` entries in runs spread evenly, or all of a smaller tensor.

    Float32, or float64 where a model's dtype is wider.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    from mergelab.merging.diff.block_sums import computing_dtype

    size = tensor.size
    dtype = computing_dtype([source.dtype for source in tensor.sources])
    if size <= count:
        return np.stack([_read(source, [0], size) for source in tensor.sources]).astype(dtype)
    number = max(1, count // _RUN)
    starts = np.linspace(0, size - _RUN, number).astype(np.int64)
    return np.stack([_read(source, starts, _RUN).astype(dtype) for source in tensor.sources])


def _read(source: TensorSource, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    values = np.empty((len(starts), length), source.dtype)
    read_runs(source, starts, values)
    return values.reshape(-1)


def change_shares(change: np.ndarray) -> np.ndarray:
    """Fractions of a change's entries by magnitude, one for each bin of `EDGES`: they add up to 1."""
    with np.errstate(over="ignore"):
        bits = change.astype(np.float32).view(np.uint32)
    counts = np.bincount((bits >> 23) & 0xFF, minlength=256)  # by the exponent that float32 stores
    bins = np.clip(np.arange(256) - 127 - _LOWEST + 1, 0, len(EDGES) - 1)
    return np.bincount(bins, weights=counts, minlength=len(EDGES)) / max(change.size, 1)


def sign_conflict(changes: np.ndarray, densities: Sequence[float] = DENSITIES) -> list[float]:
    """How often trimmed task vectors disagree in sign, for each density.

    Of each task vector the `max(1, int(density * n))` entries of largest magnitude are kept. Of the entries
    that at least two of them keep and change, the fraction is taken in which not all signs are equal; 0
    where there are none.

    Args:
        changes: `[models, n]`.
        densities: Fractions to keep.
    """
    size = np.abs(changes)
    count = changes.shape[1]
    kept = [min(count, max(1, int(density * count))) for density in densities]
    places = sorted({count - k for k in kept})
    ordered = np.partition(size, places, axis=1) if count else size
    found = []
    for k in kept:
        inside = (size >= ordered[:, count - k][:, None]) & (size > 0)
        plus = np.count_nonzero(inside & (changes > 0), axis=0)
        minus = np.count_nonzero(inside & (changes < 0), axis=0)
        shared = plus + minus > 1
        total = int(np.count_nonzero(shared))
        found.append(float(np.count_nonzero(shared & (plus > 0) & (minus > 0))) / total if total else 0.0)
    return found
