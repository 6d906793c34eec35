"""Blocks of a tensor: cut to a fixed size and read into reused buffers."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import NonFiniteError, OperatorError
from mergelab.merging.engine.job import Job
from mergelab.operators.algebra import Granularity, Stacked

__all__ = [
    "BLOCK_ELEMENTS",
    "LANES",
    "Buffers",
    "InputBlock",
    "TensorBlock",
    "blocks_of",
    "count_nonfinite",
    "fold",
    "has_nonfinite",
    "nonfinite_error",
    "nonfinite_statistic",
    "read_block",
]


BLOCK_ELEMENTS = 2**21
"""Elements per block. A constant, not a setting: partial sums are taken per block, so results are the same
bytes whatever the memory budget or the number of threads."""

LANES = 1024
"""The row length flat tensors are folded to; sums run down the columns, which keeps vector units busy."""


_FEWEST_ROWS = 256


@dataclass(frozen=True)
class TensorBlock:
    """Elements `[start, start + count)` of a tensor, computed on as a 2-D array padded with zeros.

    Attributes:
        start: flat index of the first element.
        count: number of real elements.
        shape: `[rows, columns]` with `rows * columns >= count`; of a whole tensor, its own shape.
    """

    start: int
    count: int
    shape: tuple[int, ...]


def fold(shape: tuple[int, ...], grain: Granularity) -> tuple[int, int]:
    """The 2-D view in which a tensor is cut into groups of rows.

    `element`: rows of `LANES`, the last one perhaps partial; `row`: the last axis;
    `column`: all but the first.
    """
    size = math.prod(shape)
    if grain == "row":
        columns = shape[-1] if shape else 1
    elif grain == "column":
        columns = size // shape[0] if len(shape) > 1 else 1
    else:
        columns = LANES
    return -(-size // columns), columns


def blocks_of(shape: tuple[int, ...], grain: Granularity) -> tuple[TensorBlock, ...]:
    """All blocks of a tensor, in order; empty for a tensor without elements."""
    size = math.prod(shape)
    if size == 0:
        return ()
    if grain == "tensor":
        return (TensorBlock(0, size, shape or (1,)),)
    rows, columns = fold(shape, grain)
    per_block = max(1, BLOCK_ELEMENTS // columns)
    return tuple(_cut(size, rows, columns, per_block))


def _cut(size: int, rows: int, columns: int, per_block: int) -> Iterator[TensorBlock]:
    for first in range(0, rows, per_block):
        taken = min(per_block, rows - first)
        start = first * columns
        count = min(taken * columns, size - start)
        padded = taken if taken == per_block else min(per_block, _rounded_up(taken))
        yield TensorBlock(start, count, (padded, columns))


def _rounded_up(rows: int) -> int:
    """The next power of two, at least 256: every further shape is one more program to trace and compile."""
    return max(_FEWEST_ROWS, 1 << (rows - 1).bit_length())


_ALIGNMENT = 64
"""What XLA's CPU backend needs to use memory in place."""


class Buffers:
    """A pool of aligned byte buffers: memory that was touched before is several times faster to fill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, nbytes: int) -> np.ndarray:
        """A uint8 buffer of exactly `nbytes`, its contents arbitrary."""
        with self._lock:
            if self._free[nbytes]:
                return self._free[nbytes].pop()
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT
        return raw[offset : offset + nbytes]

    def give_back(self, buffer: np.ndarray) -> None:
        """Returns a buffer that no computation reads any more."""
        with self._lock:
            self._free[buffer.size].append(buffer)


@dataclass(frozen=True)
class InputBlock:
    """One block of every input on the device, each of the block's shape.

    `buffers` back the arrays: they go back to the pool when the arrays are no longer used. `statistics` are
    the same block of each model's where they have the tensor's shape, else all of each.
    """

    values: tuple[jax.Array, ...] | Stacked
    base: jax.Array | None
    buffers: tuple[np.ndarray, ...]
    statistics: tuple[jax.Array, ...] | None = None


def read_block(job: Job, block: TensorBlock, buffers: Buffers, *, check: bool) -> InputBlock:
    """Reads one block of all inputs of a job; the padding is zero.

    Raises:
        CheckpointError: an input cannot be read.
        NonFiniteError: `check` is set and an input holds NaN or infinity.
    """
    inputs = _read_models(job, block, buffers, check=check)
    if not job.statistics:
        return inputs
    taken, arrays = [], []
    for position, source in enumerate(job.statistics):
        if tuple(source.shape) != job.shape and math.prod(block.shape) != job.size:
            raise OperatorError(
                f"the statistic of tensor {job.name!r} is {list(source.shape)} and the tensor "
                f"{list(job.shape)}: a merge that works on blocks of a tensor takes none of another shape."
            )
        own = tuple(source.shape) == job.shape
        part = block if own else TensorBlock(0, math.prod(source.shape), tuple(source.shape))
        buffer = buffers.take(math.prod(part.shape) * source.dtype.itemsize)
        flat = buffer.view(source.dtype)
        _fill(source, part, flat)
        if check and has_nonfinite(flat):
            raise nonfinite_statistic(job, position)
        taken.append(buffer)
        arrays.append(_on_device(flat.reshape(part.shape)))
    return replace(inputs, buffers=(*inputs.buffers, *taken), statistics=tuple(arrays))


def _read_models(job: Job, block: TensorBlock, buffers: Buffers, *, check: bool) -> InputBlock:
    sources = job.inputs
    size = math.prod(block.shape)
    if len({source.dtype for source in sources}) == 1:
        buffer = buffers.take(len(sources) * size * sources[0].dtype.itemsize)
        stack = buffer.view(sources[0].dtype).reshape(len(sources), size)
        for source, flat in zip(sources, stack, strict=True):
            _fill(source, block, flat)
        if check and has_nonfinite(stack):
            raise nonfinite_error(job)
        array = _on_device(stack.reshape(len(sources), *block.shape))
        return InputBlock(Stacked(array, job.base is not None), None, (buffer,))
    taken = tuple(buffers.take(size * source.dtype.itemsize) for source in sources)
    arrays = []
    for source, buffer in zip(sources, taken, strict=True):
        flat = buffer.view(source.dtype)
        _fill(source, block, flat)
        if check and has_nonfinite(flat):
            raise nonfinite_error(job)
        arrays.append(_on_device(flat.reshape(block.shape)))
    base = arrays.pop() if job.base is not None else None
    return InputBlock(tuple(arrays), base, taken)


def _fill(source: TensorSource, block: TensorBlock, flat: np.ndarray) -> None:
    source.read_into(block.start, flat[: block.count])
    flat[block.count :] = 0


def _on_device(array: np.ndarray) -> jax.Array:
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return jax.device_put(array, jax.devices()[0], may_alias=True)


_INFINITY_BITS: dict[str, int] = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
}


def has_nonfinite(flat: np.ndarray) -> bool:
    """Whether a float array holds NaN or infinity, by two integer maxima over its bits."""
    infinity = _INFINITY_BITS.get(flat.dtype.name)
    if infinity is None or flat.size == 0:
        return bool(flat.size) and not bool(np.isfinite(flat.astype(np.float32)).all())
    width = flat.dtype.itemsize
    positive = flat.view(f"i{width}").max() >= infinity
    return bool(positive or flat.view(f"u{width}").max() >= infinity + (1 << (8 * width - 1)))


def count_nonfinite(source: TensorSource, size: int) -> tuple[int, int]:
    """How many NaN and how many infinite elements a whole tensor has."""
    nans = infinities = 0
    step = 2**20
    for start in range(0, size, step):
        piece = np.empty(min(step, size - start), source.dtype)
        source.read_into(start, piece)
        wide = piece.astype(np.float32) if piece.dtype.itemsize < 4 else piece
        nans += int(np.isnan(wide).sum())
        infinities += int(np.isinf(wide).sum())
    return nans, infinities


def nonfinite_statistic(job: Job, position: int) -> NonFiniteError:
    """The sentence about one model's statistic."""
    model = job.model_names[position] if position < len(job.model_names) else f"model {position}"
    source = job.statistics[position]
    nans, infinities = count_nonfinite(source, math.prod(source.shape))
    found = f"{nans} NaN and {infinities} infinite values"
    return NonFiniteError(
        f"the statistic of tensor {source.name!r} of {model} holds {found}; "
        "compute it again, or pass --allow-nonfinite to merge with it all the same."
    )


def nonfinite_error(job: Job) -> NonFiniteError:
    """Looks through whole inputs for the sentence: which model, and how many values.

    Where all inputs are finite, the merge itself has left the range of the output's dtype.
    """
    for position, source in enumerate(job.inputs):
        nans, infinities = count_nonfinite(source, job.size)
        if nans or infinities:
            model = f" of {job.model_names[position]}" if position < len(job.model_names) else ""
            found = f"{nans} NaN and {infinities} infinite of {job.size} values"
            return NonFiniteError(
                f"tensor {source.name!r}{model} holds {found}; repair or replace that checkpoint, or pass "
                "--allow-nonfinite to merge it all the same."
            )
    return NonFiniteError(
        f"tensor {job.name!r} is finite in every model, but merged it leaves the range of {job.dtype}; "
        "choose smaller weights or a wider dtype, or pass --allow-nonfinite to write it all the same."
    )
