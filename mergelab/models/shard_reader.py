"""Reads slices of a parameter from the files that hold it, each byte once, in blocks shared among threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mergelab.checkpoints.buffers import Staging, aligned_empty
from mergelab.checkpoints.file_tensor import read_runs
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import NonFiniteError
from mergelab.models.layout import (
    Box,
    blocks,
    box_shape,
    box_size,
    intersection,
    join,
    relative,
    runs,
    slices,
    widen,
)
from mergelab.models.table import Leaf
from mergelab.platform import usable_cores

__all__ = ["PendingLeaf", "ShardReader"]

_DIRECT = 16 << 20
"""Bytes read at once where they go straight to their place."""
_STAGED = 1 << 20
"""Bytes read at once where they are cast or shared out: they should stay in a core's cache."""


@dataclass(frozen=True)
class _Destination:
    """Where the elements of `source` (a box of the stored tensor) go: `place`, in the axes of its view."""

    source: Box
    place: np.ndarray


@dataclass(frozen=True)
class PendingLeaf:
    """Slices of one leaf that are being read.

    Attributes:
        arrays: memory for each box asked for, where its elements go to: 64-byte aligned, and in the order of
            the file, so that a transposed leaf is a transposed view.
        tasks: done when the arrays are filled.
    """

    arrays: Mapping[Box, np.ndarray]
    tasks: Sequence[Future[None]]

    def wait(self) -> Mapping[Box, np.ndarray]:
        """The filled arrays; raises what reading raised."""
        for task in self.tasks:
            task.result()
        return self.arrays


class ShardReader:
    """Threads that read slices of leaves; a context manager.

    Args:
        tensors: the tensors of an open checkpoint, by HF name.
        threads: number of concurrent reads; by default one per core, at most eight.
    """

    def __init__(self, tensors: Mapping[str, TensorSource], threads: int | None = None) -> None:
        self._tensors = tensors
        self._pool = ThreadPoolExecutor(threads or min(8, usable_cores()))
        self._memory = Staging()
        self._own = threading.local()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, leaf: Leaf, boxes: Sequence[Box], dtype: np.dtype[Any]) -> PendingLeaf:
        """Begins to read boxes of a leaf, rounded to `dtype`; every tensor of the leaf must be there.

        Waiting for the result raises:
            CheckpointError: a file is truncated, has changed, or cannot be read.
            NonFiniteError: a value leaves the range of `dtype`.
        """
        arrays = {box: self._empty_in_file_order(leaf, box_shape(box), dtype) for box in boxes}
        targets: dict[str, list[_Destination]] = {}
        for box, array in arrays.items():
            for name, source, target in leaf.pullback(box):
                part = array[slices(relative(target, box))]
                place = leaf.layout.in_view_order(part[0] if leaf.stack else part, source)
                targets.setdefault(name, []).append(_Destination(source, place))
        tasks = [
            self._pool.submit(task, *arguments)
            for name, wanted in targets.items()
            for task, *arguments in self._tasks(self._tensors[name], leaf.layout.view, wanted)
        ]
        return PendingLeaf(arrays, tasks)

    def give_back(self, array: np.ndarray) -> None:
        """Lets the memory of an array that was read, and is not needed any more, be used for the next.

        An array that is contiguous is left alone: JAX may have made its memory its own.
        """
        if not array.flags.c_contiguous:
            self._memory.give_back(array)

    def _empty_in_file_order(self, leaf: Leaf, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        stacked = int(leaf.stack > 0)
        order = [*range(stacked), *(axis + stacked for axis in leaf.layout.storage_order)]
        turned = [axis for axis in order if shape[axis] != 1]
        # Only memory that will be given back is shared: a small array must not keep a large piece of it.
        empty = aligned_empty if turned == sorted(turned) else self._memory.take
        return empty([shape[axis] for axis in order], dtype).transpose(np.argsort(order))

    def _tasks(self, source: TensorSource, view: tuple[int, ...], wanted: list[_Destination]) -> list[Any]:
        width = source.dtype.itemsize
        if len(wanted) == 1 and wanted[0].place.dtype == source.dtype and wanted[0].place.flags.c_contiguous:
            (target,) = wanted
            return [
                (self._read, source, view, block, target.place[slices(relative(block, target.source))])
                for block in blocks(target.source, _DIRECT // width)
            ]
        return [
            (self._read_and_share_out, source, view, block, wanted)
            for region in join(target.source for target in wanted)
            for block in blocks(widen(view, region, width), _STAGED // width)
        ]

    def _read(self, source: TensorSource, view: tuple[int, ...], block: Box, out: np.ndarray) -> None:
        starts, length = runs(view, block)
        read_runs(source, starts, out.reshape(len(starts), length))

    def _read_and_share_out(
        self, source: TensorSource, view: tuple[int, ...], block: Box, wanted: list[_Destination]
    ) -> None:
        data = self._buffer(box_size(block), source.dtype).reshape(box_shape(block))
        self._read(source, view, block, data)
        for target in wanted:
            shared = intersection(block, target.source)
            if shared is not None:
                part = data[slices(relative(shared, block))]
                _convert(part, target.place[slices(relative(shared, target.source))], source.name)

    def _buffer(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """This thread's own memory, seen as `size` elements."""
        held: np.ndarray | None = getattr(self._own, "memory", None)
        if held is None or held.nbytes < size * dtype.itemsize:
            held = self._own.memory = aligned_empty(
                (max(_STAGED, size * dtype.itemsize),), np.dtype(np.uint8)
            )
        return held[: size * dtype.itemsize].view(dtype)


def _convert(part: np.ndarray, place: np.ndarray, name: str) -> None:
    """Puts `part` into `place`, rounded to its dtype."""
    if part.dtype == place.dtype:
        bits = f"u{part.itemsize}"  # numpy copies integers faster than bfloat16
        np.copyto(place.view(bits), part.view(bits))
        return
    with np.errstate(over="ignore"):
        np.copyto(place, part, casting="unsafe")
    if ml_dtypes.finfo(place.dtype).max < ml_dtypes.finfo(part.dtype).max and not _surely_finite(place):
        lost = int(np.count_nonzero(np.isfinite(part) & ~np.isfinite(place)))
        if lost:
            raise NonFiniteError(
                f"tensor {name!r} has {lost} values beyond the range of {place.dtype}, in a block of "
                f"{part.size}; load the model as bfloat16 or float32."
            )


def _surely_finite(values: np.ndarray) -> bool:
    """Whether 16-bit floats are all finite, told by their bits: much faster than `isfinite` of bfloat16."""
    if values.itemsize != 2 or not values.size:
        return False
    infinity = np.array(np.inf, values.dtype).view(np.uint16)
    return bool((values.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)
