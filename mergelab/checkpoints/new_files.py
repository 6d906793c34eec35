"""Single new files, published whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mergelab.checkpoints.output_target import OutputLock, Publication, check_target, disk_errors
from mergelab.checkpoints.publish import sync_path
from mergelab.errors import OutputError

__all__ = ["Content", "NewFiles", "check_new_folder", "write_tensors"]


Content = bytes | Callable[[Path], None]
"""A file's bytes, or a function that writes them to the path it is given."""


class NewFiles:
    """The names of files that are about to be made; a context manager that holds their locks.

    A file that is there is refused, unless a run that was killed while it published these very files put it
    there: the first lock's note says so, and the file is made again.

    Attributes:
        paths: the targets, absolute.
    """

    def __init__(
        self, paths: Sequence[Path | str], *, inputs: Iterable[Path | str] = (), identity: str = ""
    ) -> None:
        """Derives the names; touches nothing.

        Args:
            paths: the files that are asked for, one or more.
            inputs: files and folders that the command reads, of which none may be a target.
            identity: a digest of all that decides the content, where the caller can tell.
        """
        self.paths = tuple(Path(os.path.abspath(path)) for path in paths)
        self._inputs, self._identity = tuple(inputs), identity
        self._locks: list[OutputLock] = []
        self._kept = False

    def __enter__(self) -> Self:
        """Checks the targets and takes the locks.

        Raises:
            OutputError: a target is a folder, a link or an input, is there already, or is being written.
        """
        if len(set(self.paths)) != len(self.paths):
            raise OutputError(f"{self.paths[0]} is asked for twice; give each file a name of its own")
        for path in self.paths:
            check_target(path, self._inputs, folder=False)
        try:
            for path in self.paths:
                lock = OutputLock(path)
                lock.acquire()
                self._locks.append(lock)
            note = self._locks[0].publication()
            identity, _, inodes = ("" if note is None else note.identity).rpartition(":")
            for path in self.paths:
                if not path.exists():
                    continue
                if identity != self._identity or str(_inode(path)) not in inodes.split(","):
                    raise OutputError(f"{path} is there already; choose another name")
            self._kept = note is not None
            for path in self.paths:
                with disk_errors(path):
                    _partial(path).unlink(missing_ok=True)
        except BaseException:
            self._release()
            raise
        return self

    def publish(self, contents: Mapping[Path | str, Content]) -> None:
        """Writes the files and gives them their names.

        Args:
            contents: content of each target.

        Raises:
            OutputError: the disk is full or fails.
        """
        given = {Path(os.path.abspath(path)): content for path, content in contents.items()}
        assert set(given) <= set(self.paths), "a file was not named when the locks were taken"
        try:
            for path, content in given.items():
                with disk_errors(path):
                    if isinstance(content, bytes):
                        _partial(path).write_bytes(content)
                    else:
                        content(_partial(path))
                    sync_path(_partial(path))
            with disk_errors(self.paths[0]):
                # Those an earlier run put there are ours until they are replaced.
                inodes = [_inode(_partial(path)) for path in given]
                inodes += [_inode(path) for path in given if path.exists()]
                self._locks[0].note(Publication(f"{self._identity}:{','.join(map(str, inodes))}", inodes[0]))
                self._kept = True
            for path in given:
                with disk_errors(path):
                    os.replace(_partial(path), path)
                    sync_path(path.parent)
            self._kept = False
        finally:
            for path in given:
                _partial(path).unlink(missing_ok=True)

    def _release(self) -> None:
        locks, self._locks = self._locks, []
        for number, lock in reversed(list(enumerate(locks))):  # the first, which has the note, at last
            lock.release(keep_note=self._kept and number == 0 and any(path.exists() for path in self.paths))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def check_new_folder(out: Path) -> None:
    """Refuses a folder that holds files, for commands that replace none.

    Raises:
        OutputError: it is not empty.
    """
    with disk_errors(out):
        if out.is_dir() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty; choose another folder")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _inode(path: Path) -> int:
    return os.lstat(path).st_ino


_CODE = re.compile(r"os error (\d+)")


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a safetensors file.

    Raises:
        OSError: the file system refuses; safetensors itself raises an error of its own.
    """
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    except SafetensorError as error:
        code = _CODE.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
