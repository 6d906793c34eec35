"""What has been written of one tensor: which elements, and digests that do not depend on the pieces.

A tensor's bytes are cut into leaves of one mebibyte. Each piece is hashed leaf by leaf as it is written, so
that a tensor's digest, the hash of its leaves' hashes, is the same however it was cut into pieces.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from mergelab.checkpoints.source import TensorSource

__all__ = ["LEAF", "Receipts", "digest_leaves", "leaf_bounds", "tensor_digest"]

LEAF = 1 << 20


def leaf_bounds(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields the bytes `[offset, offset + count)` of a tensor as ranges cut at leaf boundaries."""
    end = offset + count
    while offset < end:
        stop = min(end, (offset // LEAF + 1) * LEAF)
        yield offset, stop
        offset = stop


def digest_leaves(data: memoryview, offset: int) -> list[int]:
    """Returns the XXH3-64 digests of a piece at byte `offset`, one per range of `leaf_bounds`."""
    return [
        xxhash.xxh3_64_intdigest(data[low - offset : high - offset])
        for low, high in leaf_bounds(offset, len(data))
    ]


class Receipts:
    """What has been written of a tensor of `nbytes` bytes. Not thread-safe: the writer holds its lock."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._leaves = np.zeros(-(-nbytes // LEAF), np.uint64)
        self._known = np.zeros(self._leaves.shape, np.bool_)

    @property
    def complete(self) -> bool:
        """True if every byte has been written."""
        return self.nbytes == 0 or (self._starts == [0] and self._stops == [self.nbytes])

    @property
    def empty(self) -> bool:
        """True if nothing has been written."""
        return not self._starts

    def add(self, offset: int, count: int, leaves: list[int]) -> None:
        """Notes that bytes `[offset, offset + count)` have been written and hash to `leaves`.

        Raises:
            ValueError: some of them had been written before.
        """
        if not count:
            return
        end = offset + count
        at = bisect.bisect_left(self._starts, offset)
        if (at and self._stops[at - 1] > offset) or (at < len(self._starts) and self._starts[at] < end):
            raise ValueError(f"bytes [{offset}, {end}) of a tensor are written twice")
        if at < len(self._starts) and self._starts[at] == end:
            end = self._stops[at]
            del self._starts[at], self._stops[at]
        if at and self._stops[at - 1] == offset:
            self._stops[at - 1] = end
        else:
            self._starts.insert(at, offset)
            self._stops.insert(at, end)
        for (low, high), leaf in zip(leaf_bounds(offset, count), leaves, strict=True):
            if low % LEAF == 0 and (high % LEAF == 0 or high == self.nbytes):
                self._leaves[low // LEAF] = leaf
                self._known[low // LEAF] = True

    def digest(self, read: Callable[[int, int], bytes]) -> str:
        """Returns the tensor's digest in hex; `read(offset, count)` rereads leaves cut between pieces."""
        for leaf in np.flatnonzero(~self._known):
            low = int(leaf) * LEAF
            data = read(low, min(LEAF, self.nbytes - low))
            self._leaves[leaf] = xxhash.xxh3_64_intdigest(data)
            self._known[leaf] = True
        return xxhash.xxh3_128_hexdigest(self._leaves.astype("<u8").tobytes())


def tensor_digest(tensor: TensorSource) -> str:
    """The digest that `Receipts.digest` gives of a tensor with these values; reads it leaf by leaf."""
    width = tensor.dtype.itemsize
    receipts = Receipts(math.prod(tensor.shape) * width)

    def read(offset: int, count: int) -> bytes:
        values = np.empty(count // width, tensor.dtype)
        tensor.read_into(offset // width, values)
        return values.tobytes()

    return receipts.digest(read)
