"""A weight with low-rank updates added to it, as a tensor source."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.source import TensorSource

__all__ = ["BiasedTensor", "CastTensor", "ChangedWeight", "FactorCache", "LowRankTensor", "read_whole"]


@dataclass(frozen=True)
class CastTensor:
    """A `TensorSource` that reads another one's elements, rounds them to `dtype` and answers to `name`."""

    name: str
    dtype: np.dtype[Any]
    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def over(self, change: Callable[[TensorSource], TensorSource]) -> CastTensor:
        """The same of another source."""
        return replace(self, source=change(self.source))

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; errors are those of the source."""
        check_piece(self, int(np.prod(self.shape, dtype=np.int64)), start, out)
        if self.source.dtype == self.dtype:
            self.source.read_into(start, out)
            return
        stored = np.empty(out.size, self.source.dtype)
        self.source.read_into(start, stored)
        out[:] = stored.astype(self.dtype)


_BLOCK = 1 << 18
_TILE = 64
_SMALL_PRODUCT = 1 << 18


def read_whole(source: TensorSource) -> np.ndarray:
    """Returns a small tensor in memory, in its own dtype and shape."""
    flat = np.empty(int(np.prod(source.shape, dtype=np.int64)), source.dtype)
    source.read_into(0, flat)
    return flat.reshape(source.shape)


def _compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns `left @ right` in tiles too small for the BLAS to share out among threads of its own.

    Those would spin beside the threads that stream a merge: on busy cores one product takes 50 times as long
    (measured); in tiles it takes what one thread needs.
    """
    product = np.empty((left.shape[0], right.shape[1]), left.dtype)
    width = max(16, _SMALL_PRODUCT // (_TILE * right.shape[0]))
    for row in range(0, left.shape[0], _TILE):
        for column in range(0, right.shape[1], width):
            tile = product[row : row + _TILE, column : column + width]
            np.matmul(left[row : row + _TILE], right[:, column : column + width], out=tile)
    return product


class FactorCache:
    """Keeps the factors of the modules read last, in memory, for all threads that read an adapter.

    A tensor is read in many pieces, each of which needs its factors; a large adapter's factors together would
    break the memory budget of a streamed merge.
    """

    def __init__(self, keep: int = 4) -> None:
        """`keep` is the number of modules whose factors stay."""
        self._keep = keep
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def get(
        self, name: str, read: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the factors called `name` (an adapter's tensor), reading them if they are not kept."""
        with self._lock:
            if name not in self._recent:
                self._recent[name] = read()
                if len(self._recent) > self._keep:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(name)
            return self._recent[name]


@dataclass(frozen=True)
class ChangedWeight:
    """What sources of one changed weight share: its name, shape and dtype.

    Attributes:
        weight: the tensor that is changed.
    """

    weight: TensorSource

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype

    def over(self, change: Callable[[TensorSource], TensorSource]) -> Self:
        """The same change of another weight."""
        return replace(self, weight=change(self.weight))


@dataclass(frozen=True)
class LowRankTensor(ChangedWeight):
    """A `TensorSource` equal to `weight + scale * left @ right`, rounded once to the weight's dtype.

    Attributes:
        weight: the base's tensor, `[rows, columns]`.
        left, right: the factors, `[rows, r]` and `[r, columns]`, each as its adapter tensor and whether that
            is stored transposed.
        scale: what the product is multiplied with.
        cache: where the factors stay between pieces, shared by an adapter's tensors.

    The sum is computed in float32 (float64 for a float64 weight) in blocks of rows whose bounds depend on the
    shape alone: a matrix product may round differently for another number of rows, and the result must not
    depend on the pieces it is read in.
    """

    left: tuple[TensorSource, bool]
    right: tuple[TensorSource, bool]
    scale: float
    cache: FactorCache = field(default_factory=FactorCache, repr=False, compare=False)

    def over(self, change: Callable[[TensorSource], TensorSource]) -> LowRankTensor:
        """The same update of another weight."""
        (left, left_turned), (right, right_turned) = self.left, self.right
        return replace(
            self,
            weight=change(self.weight),
            left=(change(left), left_turned),
            right=(change(right), right_turned),
        )

    def _read_factors(self) -> tuple[np.ndarray, np.ndarray]:
        left, right = (
            np.ascontiguousarray(factor.T if transposed else factor)
            for factor, transposed in (
                (read_whole(source).astype(self._compute), transposed)
                for source, transposed in (self.left, self.right)
            )
        )
        return left, right

    @property
    def _compute(self) -> np.dtype[Any]:
        return _compute_dtype(self.dtype)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the base or the adapter cannot be read.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        rows, columns = self.shape
        check_piece(self, rows * columns, start, out)
        if not out.size:
            return
        self.weight.read_into(start, out)
        left, right = self.cache.get(self.left[0].name, self._read_factors)
        height = max(1, _BLOCK // columns)
        stop = start + out.size
        for row in range(start // columns // height * height, -(-stop // columns), height):
            update = _product(left[row : row + height], right).ravel() * self._compute.type(self.scale)
            low, high = max(start, row * columns), min(stop, row * columns + update.size)
            piece = out[low - start : high - start]
            update = update[low - row * columns : high - row * columns]
            piece[:] = (piece.astype(self._compute) + update).astype(self.dtype)


@dataclass(frozen=True)
class BiasedTensor(ChangedWeight):
    """A `TensorSource` equal to `weight + scale * addend`: a bias of an adapter with `lora_bias`."""

    addend: TensorSource
    scale: float

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; errors as in `LowRankTensor`."""
        self.weight.read_into(start, out)
        addend = np.empty(out.size, self.addend.dtype)
        self.addend.read_into(start, addend)
        compute = _compute_dtype(self.dtype)
        out[:] = (out.astype(compute) + addend.astype(compute) * compute.type(self.scale)).astype(self.dtype)
