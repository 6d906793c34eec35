"""Arrays that wait for their next use: in memory, or in a file without a name."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mergelab.errors import OutputError
from mergelab.platform import read_at, write_at
from mergelab.refusals import refusal

__all__ = ["Spool"]


class _Place(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Spool:
    """Arrays by key; a context manager that gives memory and disk back.

    An array that is put under a key that is taken replaces the one before, on disk in its place where it has
    the same size. The file is unlinked from the beginning: nothing is left of it, however the process ends.

    Args:
        folder: where the file is made; None to keep the arrays in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._held: dict[Hashable, np.ndarray] = {}
        self._places: dict[Hashable, _Place] = {}
        self._file: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forgets all arrays."""
        self._held.clear()
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def on_disk(self) -> bool:
        """Whether arrays are written to disk."""
        return self._folder is not None

    def put(self, key: Hashable, array: np.ndarray) -> None:
        """Keeps an array.

        Raises:
            OutputError: the disk is full, or the folder cannot be written to.
        """
        if self._folder is None:
            self._held[key] = array
            return
        known = self._places.get(key)
        place = _Place(self._end if known is None else known.offset, array.shape, array.dtype)
        if known is None or known.size != place.size:
            place = place._replace(offset=self._end)
            self._end += place.size
        self._places[key] = place
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        try:
            write_at(self._opened().fileno(), data, place.offset)
        except OSError as error:
            raise OutputError(
                f"activations cannot be kept in {self._folder}: {refusal(error) or error}; name another "
                "folder to spill to."
            ) from error

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="mergelab-spill-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)  # a reader of rows ends with its last user
        return self._file

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._places

    def get(self, key: Hashable, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The array of a key, or entries `start` to `stop` of its first axis."""
        if self._folder is None:
            array = self._held[key]
            return array if not start and stop is None else array[start:stop]
        offset, shape, dtype = self._places[key]
        first, last, _ = slice(start, stop).indices(shape[0]) if shape else (0, 1, 1)
        each = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        out = np.empty((last - first, *shape[1:]) if shape else (), dtype)
        data, done = out.reshape(-1).view(np.uint8).data, 0
        assert self._file is not None
        while done < len(data):
            read = read_at(self._file.fileno(), data[done:], offset + first * each + done)
            if not read:
                raise OutputError(f"activations kept in {self._folder} ended early; the disk lost them.")
            done += read
        return out

    def drop(self, key: Hashable) -> None:
        """Forgets an array; on disk its place stays taken."""
        self._held.pop(key, None)
        self._places.pop(key, None)
