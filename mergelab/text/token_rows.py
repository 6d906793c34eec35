"""Rows of token ids, or of what belongs to them: in memory, in a nameless file, or in one that is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.remote import cache_folder
from mergelab.platform import trim_memory

__all__ = ["HELD", "StoredTokens", "TokenRows"]

HELD = 1 << 22
"""Elements that are held in memory; of more, all are in a file."""


class StoredTokens(np.memmap):
    """Token ids in a file, which were checked as they were written; so are those of slices of it."""


class TokenRows:
    """Rows of one kind.

    Args:
        dtype: dtype of an element.
        path: file that is kept; by default the rows are in memory or, where they are many, in a file without
            a name, of which nothing is left even by a kill.
        held: elements that are held in memory.

    Attributes:
        count: elements so far.
    """

    def __init__(self, dtype: Any, path: Path | None = None, held: int | None = None) -> None:
        self.count = 0
        self._path, self._held = path, HELD if held is None else held
        self._dtype, self._rows, self._size = np.dtype(dtype), [], 0
        self._file: IO[bytes] | None = None

    def restore(self, count: int) -> bool:
        """Takes the first elements of the kept file, and forgets those behind; False if it has fewer."""
        assert self._path is not None
        if not self._path.is_file() or self._path.stat().st_size < count * self._dtype.itemsize:
            return False
        self._file = self._path.open("r+b")
        self._file.truncate(count * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)
        self.count = count
        return True

    def add(self, rows: np.ndarray) -> None:
        """Appends rows."""
        self._rows.append(rows.astype(self._dtype))
        self._size += rows.size
        self.count += rows.size
        if self._size > self._held:
            self._drain()
            trim_memory()  # tokenizing frees small pieces, of which a C library keeps ever more

    def save(self) -> None:
        """Puts all that was added on the disk, in the file that is kept."""
        with disk_errors(self._folder()):
            os.fsync(self._drain().fileno())

    def close(self) -> None:
        """Gives up the file; one without a name is gone then. After `array` that is done already."""
        if self._file is not None:
            self._file.close()

    def _folder(self) -> Path:
        return cache_folder().with_name("tokens") if self._path is None else self._path.parent

    def _drain(self) -> IO[bytes]:
        folder = self._folder()
        with disk_errors(folder):
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                named = self._path
                self._file = tempfile.TemporaryFile(dir=folder) if named is None else named.open("w+b")  # noqa: SIM115 - see `close`
            for rows in self._rows:
                self._file.write(rows.tobytes())
            self._file.flush()
        self._rows, self._size = [], 0
        return self._file

    def array(self, length: int) -> np.ndarray:
        """All rows, `[rows, length]`; nothing can be added after that."""
        if self._file is None and self._path is None:
            return np.concatenate(self._rows or [np.zeros(0, self._dtype)]).reshape(-1, length)
        with self._drain() as file, disk_errors(self._folder()):
            if not self.count:  # which cannot be mapped
                return np.zeros((0, length), self._dtype)
            found = np.memmap(file, self._dtype, "r", shape=(self.count // length, length))
        return found.view(StoredTokens)
