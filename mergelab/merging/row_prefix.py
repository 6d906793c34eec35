"""The first rows of a tensor, for embeddings of different length that are to be cut to the shortest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.source import TensorSource

__all__ = ["RowPrefix"]


@dataclass(frozen=True)
class RowPrefix:
    """A `TensorSource` of the first `rows` rows of another; rows are contiguous, so offsets are the same."""

    source: TensorSource
    rows: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)` of the kept rows."""
        self.source.read_into(start, out)
