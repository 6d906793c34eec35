"""What codes of a few bits mean: bytes, bits packed into words, and numbers, as matrices in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mergelab.checkpoints.quantized.box_source import read_box
from mergelab.checkpoints.source import TensorSource

__all__ = ["FP4", "Bytes", "Matrix", "Numbers", "PackedBits", "byte_table", "fp4_pairs", "meanings"]

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


class Matrix(Protocol):
    """A stack of matrices of numbers that can be read in boxes."""

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        """Some rows and columns of one matrix, float32 `[rows, columns]`, which the caller may change."""
        ...


@dataclass(frozen=True)
class Numbers:
    """Numbers that are stored as such: scales and unpacked zero points.

    Bytes are exponents (E8M0, OCP microscaling formats): `2 ** (byte - 127)`, and NaN for 255.

    Attributes:
        source: Stored tensor of any numeric type.
        shape: Rows and columns of each matrix as they are read.
        turned: Whether the file stores columns as rows.
    """

    source: TensorSource
    shape: tuple[int, int]
    turned: bool = False

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        first, second = (columns, rows) if self.turned else (rows, columns)
        count, width = self.shape[::-1] if self.turned else self.shape
        stacked = range(matrix * count + first.start, matrix * count + first.stop)
        found = read_box(self.source, width, stacked, second)
        if found.dtype == np.uint8:
            found = found.view(_E8M0)
        return (found.T if self.turned else found).astype(np.float32)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Values of E2M1, the 4-bit float of the OCP microscaling formats, by code."""


@cache
def byte_table(dtype: np.dtype[Any]) -> np.ndarray:
    """Value of each byte of a one-byte type, float32 `[256, 1]`."""
    table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)[:, None]
    table.flags.writeable = False  # all tensors of the type share it
    return table


@cache
def fp4_pairs() -> np.ndarray:
    """Values of the two E2M1 numbers of each byte, the lower bits first, float32 `[256, 2]`."""
    table = _digits(FP4, 4)
    table.flags.writeable = False
    return table


def meanings(table: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """The numbers that bytes mean, float32 `[bytes, numbers]`, of `table` `[256, numbers]`."""
    wide = _AS_ONE.get(table.shape[1])
    if wide is None:
        return table[stored.reshape(-1)]
    # One element that holds all numbers of a byte is looked up several times as fast as a row of them.
    return table.view(wide)[:, 0][stored.reshape(-1)].view(np.float32).reshape(-1, table.shape[1])


_AS_ONE = {1: np.dtype(np.float32), 2: np.dtype(np.complex64), 4: np.dtype(np.complex128)}


def _digits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of the codes of `bits` bits in each byte, lowest first, float32 `[256, 8 // bits]`."""
    shifts = np.arange(0, 8, bits)
    return values[(np.arange(256)[:, None] >> shifts) & (2**bits - 1)].astype(np.float32)


@dataclass(frozen=True, eq=False)
class Bytes:
    """Bytes, each of which means one number or several in a row.

    Attributes:
        source: Stored tensor of a one-byte type.
        shape: Rows and columns of each matrix of numbers.
        table: Meaning of each byte, float32 `[256, numbers]`.
    """

    source: TensorSource
    shape: tuple[int, int]
    table: np.ndarray

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        each = self.table.shape[1]
        stacked = range(matrix * self.shape[0] + rows.start, matrix * self.shape[0] + rows.stop)
        inside = range(columns.start // each, -(-columns.stop // each))
        stored = read_box(self.source, self.shape[1] // each, stacked, inside).view(np.uint8)
        values = meanings(self.table, stored).reshape(len(rows), -1)
        skipped = columns.start - inside.start * each
        return values[:, skipped : skipped + len(columns)]


@dataclass(frozen=True, eq=False)
class PackedBits:
    """Codes of 1 to 8 bits that fill 32-bit words from their lowest bit on, running on into the next word.

    Attributes:
        source: Stored int32 tensor, a stack of matrices of words.
        shape: Rows and columns of each matrix of words.
        bits: Bits of a code.
        values: Meaning of each code, float32 `[2 ** bits]`.
        along_rows: Whether codes run down the rows of the words, so that these pack the first axis.
        turned: Whether rows of the file are columns of what is read.
        whole: Whether no code is split between words, so that those of 3, 5, 6 or 7 bits leave bits unused.
        order: Place within its word of each code; None for the plain order.
    """

    source: TensorSource
    shape: tuple[int, int]
    bits: int
    values: np.ndarray
    along_rows: bool = False
    turned: bool = False
    whole: bool = False
    order: tuple[int, ...] | None = None

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        first, second = (columns, rows) if self.turned else (rows, columns)
        packed, across = (first, second) if self.along_rows else (second, first)
        words = self._words(packed)
        if self.along_rows:
            stacked = range(matrix * self.shape[0] + words.start, matrix * self.shape[0] + words.stop)
            stored = read_box(self.source, self.shape[1], stacked, across).T
        else:
            stacked = range(matrix * self.shape[0] + across.start, matrix * self.shape[0] + across.stop)
            stored = read_box(self.source, self.shape[1], stacked, words)
        found = self._unpack(np.ascontiguousarray(stored), packed, words.start)
        return found.T if self.along_rows != self.turned else found

    def _words(self, codes: range) -> range:
        if self.whole or 32 % self.bits == 0:
            each = 32 // self.bits
            return range(codes.start // each, -(-codes.stop // each))
        return range(codes.start * self.bits // 32, -(-codes.stop * self.bits // 32))

    def _unpack(self, words: np.ndarray, codes: range, first: int) -> np.ndarray:
        """Values of the codes in `[across, words]`, of which the first column is word number `first`."""
        if 8 % self.bits == 0:
            table = _digits(self.values, self.bits)
            values = meanings(table, words.view(np.uint8)).reshape(len(words), -1)
            if self.order is not None:
                split = values.reshape(len(words), -1, len(self.order))
                values = split[:, :, self.order].reshape(len(words), -1)
            skipped = codes.start - first * (32 // self.bits)
            return values[:, skipped : skipped + len(codes)]
        number = np.arange(codes.start, codes.stop, dtype=np.int64)
        if self.whole:
            word, bit = np.divmod(number, 32 // self.bits)
            bit *= self.bits
        else:
            word, bit = np.divmod(number * self.bits, 32)
        wide = np.zeros((len(words), words.shape[1] + 1), np.uint64)
        wide[:, :-1] = words.view(np.uint32)
        pair = wide[:, word - first] | (wide[:, word - first + 1] << np.uint64(32))
        return self.values[(pair >> bit.astype(np.uint64)) & np.uint64(2**self.bits - 1)]
