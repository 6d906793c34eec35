"""Which outputs may be written, and by whom: what stands there already, and its lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, OutputError
from mergelab.platform import read_at, try_lock, write_at, writing_fault

__all__ = [
    "MARKER",
    "OutputLock",
    "Publication",
    "check_target",
    "check_vacant",
    "disk_errors",
    "recorded_identity",
]


MARKER = "mergelab.json"
"""The file by which a folder is known to be mergelab's own: only such a folder is ever replaced."""

_NAME_BYTES = 255
_LONGEST_SUFFIX = len("..replaced")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_target(out: Path, inputs: Iterable[Path | str] = (), *, folder: bool = True) -> None:
    """Refuses an output that is not a plain new or replaceable name, or by which an input could be lost.

    Symbolic links are resolved before paths are compared. Reads names only and writes nothing.

    Args:
        out: the file or folder that is asked for.
        inputs: files and folders that the command reads: models, adapters, recipes, texts, data.
        folder: whether the output is a folder; a file may lie inside an input's folder.

    Raises:
        OutputError: the output is the root, a link, of the other kind, or has too long a name; it is or
            contains an input or the working directory; or it lies inside an input; or this system (Windows)
            cannot write as models are written.
    """
    if fault := writing_fault():
        raise OutputError(f"{out}: {fault}")
    out = Path(os.path.abspath(out))
    _refuse_url(out)
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if not out.name:
        raise OutputError(f"{out} is the root of the file system; choose a {kind} inside it")
    length = len(os.fsencode(out.name))
    if length + _LONGEST_SUFFIX > _NAME_BYTES:
        raise OutputError(
            f"{out.name[:40]}...: the name has {length} bytes, but at most {_NAME_BYTES - _LONGEST_SUFFIX} "
            "can be used; choose a shorter one"
        )
    with disk_errors(out):
        if out.is_symlink():
            there = os.readlink(out)
            end = f"; name that {kind} itself" if out.exists() else ", which does not exist; remove the link"
            raise OutputError(f"{out} is a link to {there}{end} or choose another name")
        if out.exists() and out.is_dir() != folder:
            raise OutputError(f"{out} is a {other}; choose a {kind}")
        _check_inputs(out, inputs, folder)


def _refuse_url(out: Path) -> None:
    """Refuses what was a URL before it became a path: it would end in a folder here that is called `gs:`."""
    for number, part in enumerate(out.parts):
        if re.fullmatch(r"[a-z][a-z0-9+.-]+:", part) and not Path(*out.parts[: number + 1]).exists():
            url = f"{part}//{'/'.join(out.parts[number + 1 :])}"
            raise OutputError(
                f"{url} is a URL, but this output is only written to folders of this machine; choose one, "
                "and copy it there afterwards"
            )


def _check_inputs(out: Path, inputs: Iterable[Path | str], folder: bool) -> None:
    real, here = out.resolve(), Path.cwd().resolve()
    if folder and (here == real or real in here.parents):
        raise OutputError(
            f"{out} {'is' if here == real else 'contains'} the working directory; choose another folder"
        )
    for given in inputs:
        found = Path(given).resolve()
        if found == real:
            raise OutputError(f"{out} is an input of this command; choose another name for the output")
        if real in found.parents:
            raise OutputError(f"{out} contains the input {given}; choose another folder for the output")
        if folder and found in real.parents and found.is_dir():
            raise OutputError(f"{out} lies inside the input {given}; choose a folder outside it")


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds files, unless it is mergelab's own and may be overwritten.

    Raises:
        OutputError: the folder is not empty, or has no `mergelab.json` and so is not replaced.
        OSError: the file system refuses.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} is not empty; choose another folder or pass --overwrite")
    if not (out / MARKER).is_file():
        raise OutputError(
            f"{out} was not written by mergelab (it has no {MARKER}), so it is not replaced; choose another "
            "folder, or delete it yourself"
        )


def recorded_identity(out: Path) -> str | None:
    """The identity of the work that `out` is the result of, or None; folders appear only when complete."""
    try:
        found = read_json_object(out / MARKER).get("identity")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def disk_errors(out: Path, then: str = "run again") -> Iterator[None]:
    """Turns what the file system refuses into an OutputError about `out`; `then` ends its advice."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            message = f"{out}: the disk is full ({reason}); free some space and {then}"
        elif error.errno in _REFUSED:
            message = f"{out} cannot be written ({reason}); choose a place that you may write to"
        else:
            where = f" at {error.filename}" if error.filename else ""
            message = f"{out}: writing failed{where} ({reason}); check the path and the disk and {then}"
        raise OutputError(message) from error


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
            data = bytearray(_LARGEST_NOTE)
            note = json.loads(data[: read_at(self._file, memoryview(data), 0)])
            return Publication(str(note["identity"]), int(note["inode"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def note(self, publication: Publication | None) -> None:
        """Writes the note to the medium, or deletes it."""
        assert self._file is not None
        os.ftruncate(self._file, 0)
        if publication is not None:
            note = {"identity": publication.identity, "inode": publication.inode}
            write_at(self._file, json.dumps(note).encode(), 0)
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
