"""Tensors in files as sources: one run of bytes, many runs, and strided views."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.text_file import PAGE_BYTES, POINTER_BYTES, is_web_page, refuse_pointer
from mergelab.errors import CheckpointError
from mergelab.platform import read_at

__all__ = ["FileTensor", "StridedTensor", "WeightFile", "check_piece", "read_runs"]


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when its header was read; every later read checks it is still that file.

    The file is opened anew for each read: that costs some microseconds per piece, needs no shared file
    position between threads, and leaves no descriptors open however many shards a model has. Plain reads
    into reused memory are faster than the first touch of a memory map.
    """

    path: Path
    size: int
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: Path) -> WeightFile:
        """Notes the identity of the file at `path`.

        Raises:
            CheckpointError: it is missing, not a regular file, unreadable, a Git LFS pointer or a web page.
        """
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path} cannot be read ({why}); check the path") from error
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; name a weight file or a model folder")
        file = cls(path, status.st_size, (status.st_ino, status.st_mtime_ns))
        if file.size < PAGE_BYTES:
            start = file.read(0, min(file.size, POINTER_BYTES), "its beginning")
            refuse_pointer(start, str(path))
            if is_web_page(start):
                raise CheckpointError(f"{path} is a web page in place of weights; download the file again")
        return file

    def read_into(self, offset: int, out: memoryview, what: str) -> None:
        """Fills `out` (bytes) from byte `offset` on; `what` names the data in an error.

        Raises:
            CheckpointError: the file ends early, has changed since it was opened, or cannot be read.
        """
        self._check_range(offset, len(out), what)
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, (status.st_ino, status.st_mtime_ns)) != (self.size, self.stamp):
                    message = (
                        f"{self.path}: the file changed while {what} was read; run again once it is whole"
                    )
                    raise CheckpointError(message)
                file.seek(offset)
                done = 0
                while done < len(out):
                    count = file.readinto(out[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: the file became shorter while {what} was read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading {what} failed ({error.strerror})") from error

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Returns `count` bytes from byte `offset` on; errors as in `read_into`."""
        self._check_range(offset, count, what)
        data = bytearray(count)
        self.read_into(offset, memoryview(data), what)
        return bytes(data)

    def _check_range(self, offset: int, count: int, what: str) -> None:
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(
                f"{self.path}: the file ends at byte {self.size} but {what} reaches to "
                f"byte {offset + count}; download or copy the file again"
            )


@dataclass(frozen=True)
class FileTensor:
    """A `TensorSource` of elements stored contiguously in row-major order from byte `offset` of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: WeightFile
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the file ends early, has changed, or cannot be read.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        check_piece(self, self.size, start, out)
        if out.size:
            place = out.view(np.uint8).data
            self.file.read_into(self.offset + start * self.dtype.itemsize, place, f"tensor {self.name!r}")


def check_piece(tensor: Any, size: int, start: int, piece: np.ndarray) -> None:
    """Checks that `piece` is a flat contiguous buffer of `tensor.dtype` that fits into it at `start`."""
    if piece.ndim != 1 or piece.dtype != tensor.dtype or not piece.flags.c_contiguous:
        raise ValueError(
            f"a piece of tensor {tensor.name!r} is a contiguous 1-D array of {tensor.dtype}, "
            f"not {piece.ndim}-D {piece.dtype}"
        )
    if start < 0 or start + piece.size > size:
        raise ValueError(
            f"elements [{start}, {start + piece.size}) lie outside tensor {tensor.name!r} of {size} elements"
        )


def read_runs(source: TensorSource, starts: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
    """Fills row `i` of `out` with the flat elements of the tensor from `starts[i]` on.

    Args:
        source: the tensor.
        starts: the first element of each run, inside the tensor.
        out: `[runs, length]`, contiguous, of the tensor's dtype.

    Raises:
        CheckpointError: the file is shorter than its header says, has changed, or cannot be read.
    """
    if len(starts) < 2 or not isinstance(source, FileTensor):
        for start, row in zip(starts, out, strict=True):
            source.read_into(int(start), row)
        return
    # The first run goes through the tensor itself, which checks that the file is still the one it was.
    source.read_into(int(starts[0]), out[0])
    width = source.dtype.itemsize
    rows = out.view(np.uint8)
    try:
        file = os.open(source.file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            for start, row in zip(starts[1:], rows[1:], strict=True):
                _read_fully(file, source, source.offset + int(start) * width, row.data)
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(
            f"{source.file.path}: reading tensor {source.name!r} failed ({error.strerror}); "
            "check the disk and run again"
        ) from error


def _read_fully(file: int, source: FileTensor, offset: int, out: memoryview) -> None:
    while len(out):
        count = read_at(file, out, offset)
        if not count:
            raise CheckpointError(
                f"{source.file.path}: the file became shorter while tensor {source.name!r} was read; "
                "download or copy it again"
            )
        out, offset = out[count:], offset + count


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
