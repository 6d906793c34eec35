"""numpy's `.npz` files: arrays in a zip, whose headers are read and compared before anything is inflated."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import WeightFile
from mergelab.checkpoints.npy_file import MAX_HEADER, NpyHeader, parse_npy_header
from mergelab.checkpoints.stored_zip import data_offset, list_zip
from mergelab.errors import CheckpointError

__all__ = ["NpzArray", "open_npz"]

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


def open_npz(path: Path | str, names: Collection[str]) -> dict[str, NpzArray]:
    """Reads and checks the headers of arrays in a `.npz` file.

    Args:
        path: the file.
        names: of the arrays, without `.npy`; the others are not looked at.

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
