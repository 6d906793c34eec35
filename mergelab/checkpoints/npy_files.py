"""NumPy files without pickles: .npy by memory map, .npz member by member."""

from __future__ import annotations

import ast
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import FileTensor, WeightFile
from mergelab.checkpoints.stored_zip import data_offset, list_zip
from mergelab.errors import CheckpointError

__all__ = ["MAX_HEADER", "NpyFile", "NpyHeader", "NpzArray", "open_npy", "open_npz", "parse_npy_header"]


MAX_HEADER = 10_000
"""Bytes of the longest header that is parsed, as in numpy."""

_MAGIC = b"\x93NUMPY"
_NUMBERS = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class NpyHeader:
    """What the header of an array says.

    Attributes:
        shape: shape of the array.
        dtype: dtype of its elements, with their byte order.
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
        place: name of the file, for messages.

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
            f"{place} has a damaged header: its shape is not a tuple of sizes, or its fortran_order no truth "
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
    what = "Python objects, which are never unpickled" if objects else "elements that are not plain numbers"
    raise CheckpointError(f"{place} holds {what}; save it as an array of floats")


_PIECE = 1 << 20
_SMALL = 64_000_000
_MAX_RATIO = 20
"""How many times as large as the file its arrays may be, if they are not small: weights hardly compress."""


@dataclass(frozen=True)
class NpzArray:
    """An array in a zip whose header has been read, and agrees with the sizes that the zip declares."""

    name: str
    header: NpyHeader
    _file: WeightFile = field(repr=False)
    _entry: zipfile.ZipInfo = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.header.dtype

    def read(self) -> np.ndarray:
        """The array.

        Raises:
            CheckpointError: the file is damaged (its checksum is another), has changed, or cannot be read.
        """
        raw = np.empty(self.header.nbytes, np.uint8)
        skip, done = self.header.length, 0
        for piece in _pieces(self._file, self._entry):
            skipped, skip = min(skip, len(piece)), max(skip - len(piece), 0)
            rest = np.frombuffer(piece, np.uint8)[skipped:]
            raw[done : done + len(rest)] = rest
            done += len(rest)
        order = "F" if self.header.fortran else "C"
        return raw.view(self.header.dtype).reshape(self.header.shape, order=order)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; inflates the whole array for it.

        Raises:
            CheckpointError: as of `read`.
        """
        out[...] = self.read().reshape(-1)[start : start + out.size]


def open_npz(path: Path | str, names: Collection[str]) -> dict[str, NpzArray]:
    """Reads and checks the headers of arrays in a `.npz` file.

    Args:
        path: the file.
        names: names of the arrays to read, without `.npy`; others are ignored.

    Raises:
        CheckpointError: not such a file; an array is missing, twice there, of something else than plain
            numbers, or of another size than the zip declares; or all together would be far larger than the
            file.
    """
    file = WeightFile.open(Path(path))
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in list_zip(file, ".npz"):
        name = entry.filename.removesuffix(".npy")
        if name in entries:
            raise CheckpointError(f"{path} holds the array {name!r} twice; write it again")
        entries[name] = entry
    missing = [name for name in names if name not in entries]
    if missing:
        known = ", ".join(islice(entries, 20)) or "none"
        raise CheckpointError(f"{path}: has no array {missing[0]!r}, only {known}; of another format?")
    chosen = {name: entries[name] for name in names}
    total = sum(entry.file_size for entry in chosen.values())
    if total > max(_SMALL, _MAX_RATIO * file.size):
        raise CheckpointError(
            f"{path} has {file.size} bytes but would inflate to {total}, as no weights do; do not load it"
        )
    return {name: NpzArray(name, _header(file, entry), file, entry) for name, entry in chosen.items()}


def _header(file: WeightFile, entry: zipfile.ZipInfo) -> NpyHeader:
    """The header of one array, of which no more than its first pieces are inflated."""
    place = f"{file.path}: array {entry.filename!r}"
    head = b""
    for piece in _pieces(file, entry, MAX_HEADER + 12):
        head += piece
        if len(head) >= MAX_HEADER + 12:
            break
    header = parse_npy_header(head, place)
    if header.length + header.nbytes != entry.file_size:
        raise CheckpointError(
            f"{place}: {header.dtype.name} of shape {list(header.shape)} takes "
            f"{header.length + header.nbytes} bytes with its header, but the zip declares {entry.file_size}; "
            "download it again"
        )
    return header


def _pieces(file: WeightFile, entry: zipfile.ZipInfo, most: int = _PIECE) -> Iterator[bytes]:
    """The content of an entry, inflated piece by piece of at most `most` bytes.

    Raises:
        CheckpointError: it cannot be inflated, or is not as long as declared; at its end, its checksum is
            another.
    """
    place = f"{file.path}: array {entry.filename!r}"
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{place} is encrypted or compressed by a method that numpy does not write; write it again"
        )
    offset, total, checksum = data_offset(file, entry), 0, 0
    inflater = zlib.decompressobj(-15) if entry.compress_type == zipfile.ZIP_DEFLATED else None
    end = offset + entry.compress_size
    waiting = b""
    while True:
        if not waiting and offset < end:
            count = min(most, end - offset)
            waiting = file.read(offset, count, f"array {entry.filename!r}")
            offset += count
        if inflater is None:
            piece, waiting = waiting, b""
        else:
            try:
                piece = inflater.decompress(waiting, most)
            except zlib.error as error:
                raise CheckpointError(f"{place} is damaged ({error}); download it again") from error
            waiting = inflater.unconsumed_tail
        if not piece and offset >= end and not waiting:
            break
        if inflater is not None and inflater.eof and not piece:
            break
        total += len(piece)
        if total > entry.file_size:
            break
        checksum = zlib.crc32(piece, checksum)
        yield piece
    if total != entry.file_size or checksum != entry.CRC:
        raise CheckpointError(
            f"{place} is damaged: its {'size' if total != entry.file_size else 'checksum'} is not the one "
            "that the zip declares; download it again"
        )
