"""Host memory that lies where JAX can use it without a copy, and is used again where it need not keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["Staging", "aligned_empty", "aligned_zeros"]

_ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialized C-contiguous array that starts at a multiple of 64 bytes."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes; a large array takes no memory until it is written to."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(
    make: Callable[[int, type[np.uint8]], np.ndarray], shape: Sequence[int], dtype: np.dtype[Any]
) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = make(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Staging:
    """A few pieces of memory in use in turn: the first touch of new memory costs as much as reading a file.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Aligned, uninitialized memory of this shape; its contents may be an earlier user's."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        large = [memory for memory in self._free if memory.nbytes >= size]
        if large:
            memory = min(large, key=lambda memory: memory.nbytes)
            self._free = [other for other in self._free if other is not memory]
        else:  # what is too small now makes room for what is not
            memory = aligned_empty((size,), np.dtype(np.uint8))
            self._free = self._free[1:]
        return memory[:size].view(dtype).reshape(shape)

    def give_back(self, array: np.ndarray) -> None:
        """Takes back what `take` gave (or a transposed view of it), to be overwritten by its next user."""
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        self._free.append(array.transpose(order).reshape(-1).view(np.uint8))
