"""Reads slices of a parameter from the files that hold it, each byte once, in blocks shared among threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mergelab.checkpoints.runs import read_runs
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import NonFiniteError
from mergelab.models import transposed_copy
from mergelab.models.declaration import Leaf
from mergelab.models.layout import Box, box_shape, box_size, slices
from mergelab.models.regions import blocks, intersection, join, relative, runs, widen

__all__ = ["Reading", "ShardReader", "aligned_empty"]

_DIRECT = 16 << 20
"""Bytes read at once where they go straight to their place."""
_STAGED = 1 << 20
"""Bytes read at once where they are transposed, cast or shared out: they should stay in a core's cache."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Target:
    """Where the elements of `source` (a box of the stored tensor) go: `place`, in the axes of its view."""

    source: Box
    place: np.ndarray


@dataclass(frozen=True)
class Reading:
    """Slices of one leaf that are being read.

    Attributes:
        arrays: for each box asked for, the memory its elements go to, aligned for JAX to use without a copy.
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
        threads: how many read at once; by default one per core, at most eight.
    """

    def __init__(self, tensors: Mapping[str, TensorSource], threads: int | None = None) -> None:
        self._tensors = tensors
        self._pool = ThreadPoolExecutor(threads or min(8, len(os.sched_getaffinity(0))))
        self._staging = threading.local()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, leaf: Leaf, boxes: Sequence[Box], dtype: np.dtype[Any]) -> Reading:
        """Begins to read boxes of a leaf, rounded to `dtype`; every tensor of the leaf must be there.

        Waiting for the result raises:
            CheckpointError: a file is truncated, has changed, or cannot be read.
            NonFiniteError: a value leaves the range of `dtype`.
        """
        arrays = {box: aligned_empty(box_shape(box), dtype) for box in boxes}
        targets: dict[str, list[_Target]] = {}
        for box, array in arrays.items():
            for name, source, target in leaf.pullback(box):
                part = array[slices(relative(target, box))]
                place = leaf.layout.in_view_order(part[0] if leaf.stack else part, source)
                targets.setdefault(name, []).append(_Target(source, place))
        tasks = [
            self._pool.submit(task, *arguments)
            for name, wanted in targets.items()
            for task, *arguments in self._tasks(self._tensors[name], leaf.layout.view, wanted)
        ]
        return Reading(arrays, tasks)

    def _tasks(self, source: TensorSource, view: tuple[int, ...], wanted: list[_Target]) -> list[Any]:
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
        self, source: TensorSource, view: tuple[int, ...], block: Box, wanted: list[_Target]
    ) -> None:
        data = self._buffer(box_size(block), source.dtype).reshape(box_shape(block))
        self._read(source, view, block, data)
        for target in wanted:
            shared = intersection(block, target.source)
            if shared is not None:
                part = _cast(data[slices(relative(shared, block))], target.place.dtype, source.name)
                transposed_copy.copy(part, target.place[slices(relative(shared, target.source))])

    def _buffer(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """This thread's own staging memory, seen as `size` elements."""
        held: np.ndarray | None = getattr(self._staging, "memory", None)
        if held is None or held.nbytes < size * dtype.itemsize:
            held = self._staging.memory = aligned_empty(
                (max(_STAGED, size * dtype.itemsize),), np.dtype(np.uint8)
            )
        return held[: size * dtype.itemsize].view(dtype)


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _cast(array: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max:
        lost = int(np.count_nonzero(np.isfinite(array) & ~np.isfinite(found)))
        if lost:
            raise NonFiniteError(
                f"tensor {name!r} has {lost} values beyond the range of {dtype}, in a block of {array.size}; "
                "load the model as bfloat16 or float32."
            )
    return found
