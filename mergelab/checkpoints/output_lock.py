"""One writer per output: a lock file beside it, which also notes what is being published."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mergelab.checkpoints.output_target import disk_errors
from mergelab.errors import OutputError
from mergelab.platform import try_lock

__all__ = ["OutputLock", "Publication"]

_LARGEST_NOTE = 1 << 16


@dataclass(frozen=True)
class Publication:
    """A note that a complete folder is about to get its final name, or has got it.

    Attributes:
        identity: SHA-256 of all that decides the content.
        inode: inode number of the complete folder, which it keeps under every name.
    """

    identity: str
    inode: int


class OutputLock:
    """The lock on an output, held through `.NAME.lock` beside it; a context manager.

    It dies with its process. The file is removed with the lock, unless it still notes a publication whose
    leftovers must be cleared by the next run.
    """

    def __init__(self, out: Path) -> None:
        """Derives the lock file's name; touches nothing."""
        self.out = out
        self.path = out.with_name(f".{out.name}.lock")
        self._file: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Takes the lock, making the folders above the output if need be.

        Raises:
            OutputError: another run holds it, or the file system refuses.
        """
        with disk_errors(self.out):
            self._make_parents()
            while self._file is None:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                if not try_lock(file):
                    os.close(file)
                    raise OutputError(
                        f"{self.out}: another run is writing this output; wait for it or choose another name"
                    )
                if self._is_named(file):
                    self._file = file
                else:  # the run before removed it between our opening and our locking
                    os.close(file)

    def _make_parents(self) -> None:
        missing = [folder for folder in self.out.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._created.append(folder)

    def _is_named(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def publication(self) -> Publication | None:
        """The note that this run, or one that was killed, has left in the lock file."""
        assert self._file is not None
        try:
            note = json.loads(os.pread(self._file, _LARGEST_NOTE, 0))
            return Publication(str(note["identity"]), int(note["inode"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def note(self, publication: Publication | None) -> None:
        """Writes the note to the medium, or deletes it."""
        assert self._file is not None
        os.ftruncate(self._file, 0)
        if publication is not None:
            note = {"identity": publication.identity, "inode": publication.inode}
            os.pwrite(self._file, json.dumps(note).encode(), 0)
            os.fsync(self._file)

    def release(self, *, keep_note: bool = False) -> None:
        """Gives the lock back and removes its file; does nothing if the lock is not held.

        Args:
            keep_note: leave the file, since the next run needs its note.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        if not keep_note:
            self.path.unlink(missing_ok=True)
        os.close(file)
        if not self.out.exists():
            for folder in reversed(self._created):
                try:
                    folder.rmdir()
                except OSError:  # it is in use
                    break
        self._created = []

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
