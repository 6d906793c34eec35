"""A tensor stored with strides (a saved transpose or slice), gathered into row-major order as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import WeightFile, check_piece

__all__ = ["StridedTensor"]

_ELEMENTS = 1 << 20
_WINDOW = 1 << 24


@dataclass(frozen=True)
class StridedTensor:
    """A `TensorSource` whose element `[i, j, ...]` lies `i*strides[0] + j*strides[1] + ...` elements on.

    A piece is gathered a million elements at a time, reading the bytes they span in windows of 16 MB: memory
    stays bounded, at the price of reading a transposed tensor's bytes once per million elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: WeightFile
    offset: int
    strides: tuple[int, ...]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the file ends early, has changed, or cannot be read.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        check_piece(self, int(np.prod(self.shape, dtype=np.int64)), start, out)
        for done in range(0, out.size, _ELEMENTS):
            part = out[done : done + _ELEMENTS]
            self._gather(self._places(start + done, part.size), part)

    def _places(self, start: int, count: int) -> np.ndarray:
        """Returns where elements `[start, start + count)` are stored, int64 [count], from `offset` on."""
        rest = np.arange(start, start + count, dtype=np.int64)
        places = np.zeros(count, np.int64)
        for dimension, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            rest, index = np.divmod(rest, dimension)
            places += index * stride
        return places

    def _gather(self, places: np.ndarray, out: np.ndarray) -> None:
        width = self.dtype.itemsize
        last = int(places.max())
        left = places
        while left.size:  # windows that hold no element are passed over: a stride may be as large as the file
            low = int(left.min())
            window = np.empty(min(_WINDOW // width, last + 1 - low), self.dtype)
            place = window.view(np.uint8).data
            self.file.read_into(self.offset + low * width, place, f"tensor {self.name!r}")
            inside = (places >= low) & (places < low + window.size)
            out[inside] = window[places[inside] - low]
            left = left[left >= low + window.size]
