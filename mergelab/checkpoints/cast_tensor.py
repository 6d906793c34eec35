"""A tensor source under another name and, where it differs, in another float type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.source import TensorSource

__all__ = ["CastTensor"]


@dataclass(frozen=True)
class CastTensor:
    """A `TensorSource` that reads another one's elements, rounds them to `dtype` and answers to `name`."""

    name: str
    dtype: np.dtype[Any]
    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; errors are those of the source."""
        check_piece(self, int(np.prod(self.shape, dtype=np.int64)), start, out)
        if self.source.dtype == self.dtype:
            self.source.read_into(start, out)
            return
        stored = np.empty(out.size, self.source.dtype)
        self.source.read_into(start, stored)
        out[:] = stored.astype(self.dtype)
