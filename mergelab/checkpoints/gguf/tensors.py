"""Tensors of GGUF files as sources: blocks dequantized on read, and the layouts of llama.cpp undone.

The arithmetic of quantized blocks is that of the `gguf` package, but for the simplest (`plain_blocks`). Rows
of a quantized tensor are whole blocks, so that any run of elements is a run of blocks; what is kept in memory
beside a piece is a bounded number of blocks.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mergelab.checkpoints.file_tensor import WeightFile, check_piece
from mergelab.checkpoints.gguf.plain_blocks import PLAIN
from mergelab.errors import DependencyError

__all__ = ["KINDS", "GgufTensor", "Kind", "StoredTensor", "arithmetic", "kind_name"]


class Kind(NamedTuple):
    """A type of elements: its name, the elements and the bytes of a block, the dtype it is read as."""

    name: str
    elements: int
    nbytes: int
    dtype: np.dtype[Any]


_F32 = np.dtype(np.float32)

KINDS: dict[int, Kind] = {
    0: Kind("F32", 1, 4, _F32),
    1: Kind("F16", 1, 2, np.dtype(np.float16)),
    30: Kind("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    2: Kind("Q4_0", 32, 18, _F32),
    3: Kind("Q4_1", 32, 20, _F32),
    6: Kind("Q5_0", 32, 22, _F32),
    7: Kind("Q5_1", 32, 24, _F32),
    8: Kind("Q8_0", 32, 34, _F32),
    10: Kind("Q2_K", 256, 84, _F32),
    11: Kind("Q3_K", 256, 110, _F32),
    12: Kind("Q4_K", 256, 144, _F32),
    13: Kind("Q5_K", 256, 176, _F32),
    14: Kind("Q6_K", 256, 210, _F32),
}
"""The types that are read, by their number in ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

_OTHERS = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"}
_OTHERS |= {21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_OTHERS |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}

_CHUNK = 2**17  # elements dequantized at once: the temporaries stay in the cache
_TRANSPOSED_CHUNK = 2**20


def kind_name(number: int) -> str:
    """The name of a type, known to be read or not."""
    return KINDS[number].name if number in KINDS else _OTHERS.get(number, f"number {number}")


def arithmetic() -> ModuleType:
    """The module of the `gguf` package that quantizes and dequantizes.

    Raises:
        DependencyError: the package is not installed.
    """
    try:
        return importlib.import_module("gguf.quants")
    except ImportError as error:
        raise DependencyError(
            "quantized tensors of a GGUF file need the package gguf; pip install 'mergelab[gguf]'"
        ) from error


@dataclass(frozen=True)
class StoredTensor:
    """The elements of a tensor in the order in which the file has them, flat."""

    file: WeightFile
    name: str
    kind: int
    offset: int
    size: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Elements `[start, start + count)` in the dtype they are read as."""
        out = np.empty(count, KINDS[self.kind].dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous and of the dtype they are read as, with elements from `start` on."""
        kind = KINDS[self.kind]
        if kind.elements == 1:
            place = out.view(np.uint8).data
            self.file.read_into(self.offset + start * kind.nbytes, place, f"tensor {self.name!r}")
            return
        for done in range(0, out.size, _CHUNK):
            self._dequantize(start + done, out[done : done + _CHUNK])

    def _dequantize(self, start: int, out: np.ndarray) -> None:
        kind, plain = KINDS[self.kind], PLAIN.get(self.kind)
        first, last = start // kind.elements, -(-(start + out.size) // kind.elements)
        raw = np.empty((1, (last - first) * kind.nbytes), np.uint8)
        self.file.read_into(self.offset + first * kind.nbytes, raw.data.cast("B"), f"tensor {self.name!r}")
        # A damaged scale is an infinity or NaN here, and found where weights are checked to be finite.
        with np.errstate(all="ignore"):
            if plain is None:
                quants = arithmetic()
                values = quants.dequantize(raw, quants.GGMLQuantizationType(self.kind))[0]
            else:
                whole = out.size == (last - first) * kind.elements
                values = out if whole else np.empty((last - first) * kind.elements, kind.dtype)
                plain(raw.reshape(-1, kind.nbytes), values.reshape(-1, kind.elements))
        if values is not out:
            out[:] = values[start - first * kind.elements :][: out.size]


@dataclass(frozen=True)
class GgufTensor:
    """A `TensorSource` of a stored tensor, or of a slice of it, as Hugging Face models have it.

    Attributes:
        name: the tensor's name in a Hugging Face model.
        shape: its shape there.
        stored: the elements.
        begin: the stored element at which it begins.
        order: the stored row of each of its rows, counted from `begin`; None where they are in order.
        shift: what is added to every element.
        transposed: the file has the matrix transposed.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor
    begin: int = 0
    order: np.ndarray | None = field(default=None, compare=False, repr=False)
    shift: float = 0.0
    transposed: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Float32 for quantized elements; that of the file for others."""
        return KINDS[self.stored.kind].dtype

    @property
    def form(self) -> str | None:
        """Stored format, such as `Q4_1`; None where the elements are not quantized."""
        kind = KINDS[self.stored.kind]
        return None if kind.elements == 1 else kind.name

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file that hold its elements."""
        kind = KINDS[self.stored.kind]
        return math.prod(self.shape) * kind.nbytes // kind.elements

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the file ends early, has changed, or cannot be read.
            DependencyError: the elements are quantized and the gguf package is not installed.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        check_piece(self, math.prod(self.shape), start, out)
        if not out.size:
            return
        if self.transposed:
            self._read_transposed(start, out)
        elif self.order is not None:
            self._read_rows(start, out)
        else:
            self.stored.read_into(self.begin + start, out)
        if self.shift:
            out[:] = (out.astype(np.float32) + np.float32(self.shift)).astype(out.dtype)

    def _read_rows(self, start: int, out: np.ndarray) -> None:
        """Reads whole runs of stored rows, and puts each row in its place."""
        assert self.order is not None
        width = math.prod(self.shape[1:])
        first, last = start // width, -(-(start + out.size) // width)
        whole = start % width == 0 == out.size % width
        for run, places in _runs(self.order[first:last], max(1, _CHUNK // width)):
            rows = self.stored.read(self.begin + run * width, len(places) * width).reshape(-1, width)
            if whole:
                out.reshape(-1, width)[places] = rows
                continue
            for row, place in zip(rows, places, strict=True):
                begin = (first + int(place)) * width - start  # the first and last rows may stick out
                low, high = max(begin, 0), min(begin + width, out.size)
                out[low:high] = row[low - begin : high - begin]

    def _read_transposed(self, start: int, out: np.ndarray) -> None:
        """Reads the stored rows in order, and takes from each the columns that are asked for."""
        columns, rows = self.shape  # as stored, there are `rows` rows of `columns` elements
        first, last = start // rows, -(-(start + out.size) // rows)
        step = max(1, _TRANSPOSED_CHUNK // columns)
        band = max(1, _TRANSPOSED_CHUNK // rows)
        for low in range(first, last, band):  # a bounded copy of whole rows of ours, then the piece of it
            high = min(low + band, last)
            whole = np.empty((high - low, rows), self.dtype)
            for row in range(0, rows, step):
                count = min(step, rows - row)
                read = self.stored.read(self.begin + row * columns, count * columns).reshape(count, columns)
                whole[:, row : row + count] = read[:, low:high].T
            flat, begin = whole.reshape(-1), low * rows - start
            inner, outer = max(begin, 0), min(begin + flat.size, out.size)
            out[inner:outer] = flat[inner - begin : outer - begin]


def _runs(order: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of at most `most` stored rows: where each begins, and the place of each of its rows in `order`."""
    places = np.argsort(order, kind="stable")
    stored = order[places]
    breaks = np.flatnonzero(np.diff(stored) != 1) + 1
    for part in np.split(np.arange(stored.size), breaks):
        for begin in range(0, part.size, most):
            chosen = part[begin : begin + most]
            yield int(stored[chosen[0]]), places[chosen]
