"""numpy's `.npy` files: the header parsed within limits of our own, the rows read by plain reads.

Format: a magic string, a version, the length of the header, and the header, a Python literal
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). Only plain numbers are read: what
would have to be unpickled is refused, and so is a shape that the bytes behind the header do not bear out.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import FileTensor, WeightFile
from mergelab.errors import CheckpointError

__all__ = ["MAX_HEADER", "NpyFile", "NpyHeader", "open_npy", "parse_npy_header"]

MAX_HEADER = 10_000
"""Bytes of the longest header that is parsed, as in numpy."""

_MAGIC = b"\x93NUMPY"
_NUMBERS = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class NpyHeader:
    """What the header of an array says.

    Attributes:
        shape: of the array.
        dtype: of its elements, with their byte order.
        fortran: whether the first axis runs fastest.
        length: bytes before the first element.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class NpyFile:
    """A `.npy` file whose header has been read and agrees with the size of the file."""

    header: NpyHeader
    tensor: FileTensor

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of an array with two axes.

        Raises:
            CheckpointError: the file has changed, or cannot be read.
        """
        rows, width = self.header.shape
        if not self.header.fortran:
            found = np.empty((stop - start, width), self.header.dtype)
            self.tensor.read_into(start * width, found.reshape(-1))
            return found
        columns = np.empty((width, stop - start), self.header.dtype)
        for place, column in enumerate(columns):
            self.tensor.read_into(place * rows + start, column)
        return columns.T


def open_npy(path: Path | str) -> NpyFile:
    """Reads and checks the header of a `.npy` file; reads no elements.

    Raises:
        CheckpointError: not such a file, truncated, or of something else than plain numbers.
    """
    file = WeightFile.open(Path(path))
    head = file.read(0, min(file.size, MAX_HEADER + 12), "the header")
    header = parse_npy_header(head, str(path))
    if header.length + header.nbytes > file.size:
        raise CheckpointError(
            f"{path} ends at byte {file.size}, but {header.dtype.name} of shape {list(header.shape)} reaches "
            f"to byte {header.length + header.nbytes}; copy or write it again"
        )
    return NpyFile(header, FileTensor("array", header.shape, header.dtype, file, header.length))


def parse_npy_header(head: bytes, place: str) -> NpyHeader:
    """Returns what a header says.

    Args:
        head: the beginning of the file, with all of the header if that is not too long.
        place: which file, for messages.

    Raises:
        CheckpointError: not a header of numpy's, one that is too long, or one of something else than numbers.
    """
    if len(head) < 10 or not head.startswith(_MAGIC):
        raise CheckpointError(
            f"{place} is not a .npy file (it does not begin as numpy's files do); write it again with np.save"
        )
    version = head[6]
    width = {1: 2, 2: 4, 3: 4}.get(version)
    if width is None or head[7] != 0:
        raise CheckpointError(
            f"{place} has version {version}.{head[7]} of the .npy format, where 1.0 to 3.0 are known; "
            "write it again with np.save"
        )
    begin = 8 + width
    length = int.from_bytes(head[8:begin], "little")
    if length > MAX_HEADER or len(head) < begin + length:
        raise CheckpointError(
            f"{place} has a header of {length} bytes, which is longer than the file or than the {MAX_HEADER} "
            "that are read; write it again with np.save"
        )
    said = _literal(head[begin : begin + length], "utf-8" if version == 3 else "latin-1")
    if not isinstance(said, dict) or said.keys() != {"descr", "fortran_order", "shape"}:
        raise CheckpointError(
            f"{place} has a damaged header: a mapping of descr, fortran_order and shape was expected; copy "
            "or write it again"
        )
    shape, fortran = said["shape"], said["fortran_order"]
    dtype = _numbers(said["descr"], place)
    sizes = isinstance(shape, tuple) and all(type(d) is int and 0 <= d < 2**63 for d in shape)
    if not sizes or type(fortran) is not bool or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{place} has a damaged header: its shape is no tuple of sizes, or its fortran_order no truth "
            "value; copy or write it again"
        )
    if math.prod(d for d in shape if d) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{place} has a shape too large to be genuine; copy or write it again")
    return NpyHeader(shape, dtype, fortran, begin + length)


def _literal(raw: bytes, encoding: str) -> Any:
    """The value of a Python literal, or None of what is none; runs nothing."""
    try:
        text = raw.decode(encoding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a damaged header may look like odd Python
            # Python 2 wrote sizes as 3L.
            return ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text).strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _numbers(descr: Any, place: str) -> np.dtype[Any]:
    if isinstance(descr, str) and _NUMBERS.fullmatch(descr):
        return np.dtype(descr)
    objects = isinstance(descr, str) and descr.lstrip("|<>=") == "O"
    what = "Python objects, which are never unpickled" if objects else "elements that are no plain numbers"
    raise CheckpointError(f"{place} holds {what}; save it as an array of floats")
