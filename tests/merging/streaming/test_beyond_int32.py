"""Tensors beyond 2^31 elements: streamed right to their far end, refused in memory beyond 2^32."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.merging.engine import stream_jobs
from mergelab.merging.engine.job import Job
from mergelab.operators.order_statistics import kept_count

SIZE = 2**31 + 9
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
WINDOW = 64  # elements at the far end that are looked at one by one


@dataclass(frozen=True)
class ConstantSource:
    """A tensor of one value that exists only as it is read, with a few other values planted in it."""

    value: float
    planted: dict[int, float] = field(default_factory=dict)
    name: str = "t"
    shape: tuple[int, ...] = (SIZE,)
    dtype: np.dtype[Any] = FP8

    def read_into(self, start: int, out: np.ndarray) -> None:
        out.view(np.uint8).fill(int(np.array(self.value, FP8).view(np.uint8)))
        for index, value in self.planted.items():
            if start <= index < start + out.size:
                out[index - start] = value

    def window(self) -> np.ndarray:
        out = np.empty(WINDOW, FP8)
        self.read_into(SIZE - WINDOW, out)
        return out.astype(np.float32)


@dataclass
class WindowWriter:
    """Counts what is written, and keeps the far end."""

    done: frozenset[str] = frozenset()
    written: int = 0
    nonzero: int = 0
    window: np.ndarray = field(default_factory=lambda: np.zeros(WINDOW, np.float32))

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        self.written += array.size
        self.nonzero += int(np.count_nonzero(array.view(np.uint8)))
        first = SIZE - WINDOW
        if start + array.size > first:
            begin = max(start, first)
            piece = array[begin - start :].astype(np.float32)
            self.window[begin - first : begin - first + piece.size] = piece


PLANTED = {0: 2.0, 2**31 - 1: -2.0, 2**31: 4.0, SIZE - 2: -8.0, SIZE - 1: 16.0}


def streamed(merge: ops.Merge, model: ConstantSource) -> WindowWriter:
    """Merges the model relative to a base of zeros, on one thread: the writer counts without a lock."""
    writer = WindowWriter()
    job = Job("t", (SIZE,), FP8, (model,), ConstantSource(0.0), merge)
    stream_jobs([job], writer, threads=1)
    assert writer.written == SIZE
    return writer


@pytest.mark.slow
def test_task_arithmetic_reaches_the_far_end() -> None:
    model = ConstantSource(0.0, PLANTED)
    found = streamed(ops.task_arithmetic(weight=0.5), model)
    assert found.nonzero == len(PLANTED)
    np.testing.assert_array_equal(found.window, 0.5 * model.window())
    assert np.count_nonzero(found.window) == 4


@pytest.mark.slow
def test_ties_are_cut_at_an_index_beyond_31_bits() -> None:
    """All but five entries tie: the larger ones stay, and of the ties those before the right index."""
    model = ConstantSource(1.0, PLANTED)
    density = 1 - 20 / SIZE
    kept = kept_count(density, SIZE)
    dropped = SIZE - kept
    assert 15 <= dropped <= 25
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = streamed(ops.ties(weight=1.0, density=density), model)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 2**20, "a search held a good part of the tensor's 8 GiB of keys"
    assert found.nonzero == kept
    expected = model.window()
    last_ties = np.flatnonzero(np.abs(expected) == 1)[-dropped:]
    expected[last_ties] = 0
    np.testing.assert_array_equal(found.window, expected)


def test_tensors_that_32_bits_cannot_index_are_refused_in_memory() -> None:
    huge = {"t": np.broadcast_to(np.float32(0), (2**16, 2**16))}  # takes no memory: one number, repeated
    with pytest.raises(OperatorError, match=r"'t' has 4294967296 elements; .* use the streaming engine"):
        ops.uniform()([huge, huge])
