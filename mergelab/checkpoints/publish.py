"""The one way to publish: an output is locked, made beside its target, and given its name in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from mergelab.checkpoints.output_target import (
    MARKER,
    OutputLock,
    Publication,
    check_target,
    check_vacant,
    disk_errors,
)
from mergelab.errors import OutputError
from mergelab.platform import exchange
from mergelab.version import __version__

__all__ = ["WorkFolder", "publish_file", "sync_path", "sync_tree"]


class WorkFolder:
    """The place where a folder is made before it gets its name; a context manager that holds the lock.

    At every moment the target is the whole old folder, the whole new one, or nothing if there was none. What
    a killed run left (beside the target, under hidden names) is repaired when the next run enters:

        .NAME.lock      the lock, and the note of a publication that has begun
        .NAME.partial   the folder that is being made
        .NAME.journal   receipts of what is in it, where the command has `--resume`
        .NAME.stages    intermediate results
        .NAME.replaced  the old folder, where the system cannot exchange two folders in one step

    Example:
        >>> with WorkFolder(out, inputs=[model], overwrite=overwrite) as work:  # doctest: +SKIP
        ...     if not work.finished(identity):
        ...         work.prepare(nbytes)
        ...         work.clear()
        ...         write_files(work.path)
        ...         work.publish(identity)

    Attributes:
        out: the target, absolute.
        path: the folder that is being made.
        journal: where a journal may be kept.
        stages: a folder for intermediate results; deleted when the output is published.
    """

    def __init__(
        self, out: Path | str, *, inputs: Iterable[Path | str] = (), overwrite: bool = False
    ) -> None:
        """Derives the names; touches nothing.

        Args:
            out: the folder that is asked for.
            inputs: files and folders that the command reads, which the output must not endanger.
            overwrite: whether a folder that mergelab wrote may be replaced.
        """
        self.out = Path(os.path.abspath(out))
        self.path, self.journal, self.stages, self._replaced = (
            self.out.with_name(f".{self.out.name}.{suffix}") if self.out.name else self.out
            for suffix in ("partial", "journal", "stages", "replaced")
        )
        self._inputs = tuple(inputs)
        self._overwrite = overwrite
        self._lock: OutputLock | None = None
        self._published: Publication | None = None

    def __enter__(self) -> Self:
        """Checks the target, takes the lock, and completes what a killed run had begun to publish.

        Raises:
            OutputError: the target may not be written, or another run is writing it.
        """
        check_target(self.out, self._inputs)
        lock = OutputLock(self.out)
        lock.acquire()
        self._lock = lock
        try:
            with disk_errors(self.out):
                self._recover(lock)
        except BaseException:
            self._release()
            raise
        return self

    def _recover(self, lock: OutputLock) -> None:
        if (note := lock.publication()) is not None:
            self._rename(note)
            if _inode(self.out) == note.inode:
                self._published = note
            self._clear_beside()
        elif self._replaced.is_dir():
            if self.out.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.out)

    def finished(self, identity: str) -> bool:
        """Whether the same work has given the output its name and was killed then: nothing is left to do."""
        return bool(identity) and self._published is not None and self._published.identity == identity

    @property
    def published(self) -> bool:
        """Whether a killed run, of this work or another, had given the output its name."""
        return self._published is not None

    def prepare(self, needed: int = 0) -> None:
        """Checks that the target is free, or may be replaced, and that the disk holds `needed` bytes.

        Raises:
            OutputError: the target is not empty, is not mergelab's own, or the disk is too small.
        """
        with disk_errors(self.out):
            check_vacant(self.out, overwrite=self._overwrite)
            free = shutil.disk_usage(self.out.parent).free + self._allocated()
            if free < needed:
                raise OutputError(
                    f"{self.out}: the output needs {needed / 1e9:.3f} GB but only {free / 1e9:.3f} GB are "
                    "free; free some space or choose another disk"
                )
            if self._published is not None:
                self._published = None
                self._held.note(None)

    def _allocated(self) -> int:
        if not self.path.is_dir():
            return 0
        return sum(entry.stat().st_blocks * 512 for entry in self.path.rglob("*") if entry.is_file())

    def clear(self, *, recreate: bool = True) -> None:
        """Deletes the work folder with all in it, and makes an empty one."""
        _remove(self.path)
        if recreate:
            self.path.mkdir()

    def clear_stages(self) -> None:
        """Deletes the intermediate results of an earlier run."""
        _remove(self.stages)

    def keep_only(self, names: Iterable[str]) -> None:
        """Deletes everything that is not one of `names`: an earlier run's config or index."""
        kept = set(names)
        for entry in self.path.iterdir():
            if entry.name not in kept:
                _remove(entry)

    def publish(self, identity: str, *, durable: bool = True) -> Path:
        """Gives the work folder its final name, in one step, and deletes all that is beside it.

        A folder without `mergelab.json` gets one, which says that it is mergelab's own.

        Args:
            identity: SHA-256 of all that decides the content, by which a run of the same work knows an output
                that was published before its own run was killed; empty if that cannot be told.
            durable: wait until everything is on the medium (fsync), so that a power cut cannot leave the
                final name on incomplete files.

        Raises:
            OutputError: something was put in the target's place meanwhile, or the disk is full or fails.
        """
        with disk_errors(self.out):
            if not (self.path / MARKER).exists():
                (self.path / MARKER).write_text(json.dumps({"mergelab": __version__}, indent=2) + "\n")
            if durable:
                sync_tree(self.path)
            check_target(self.out, self._inputs)
            check_vacant(self.out, overwrite=self._overwrite)
            note = Publication(identity, _inode(self.path))
            self._held.note(note)
            self._rename(note)
            if durable:
                sync_path(self.out.parent)
            self._published = note
            self._clear_beside()
        return self.out

    def _rename(self, note: Publication) -> None:
        """Gives the noted folder its final name, if it has not got it yet."""
        if _inode(self.path) != note.inode:
            return
        if self.out.is_dir() and any(self.out.iterdir()):
            if exchange(self.path, self.out):
                return
            self.out.rename(self._replaced)
        os.replace(self.path, self.out)

    def _clear_beside(self) -> None:
        for path in (self.stages, self.path, self._replaced, self.journal):
            _remove(path)

    def abandon(self) -> None:
        """Deletes everything beside the target, which stays as it was."""
        self._clear_beside()

    @property
    def _held(self) -> OutputLock:
        assert self._lock is not None, "the work folder is used outside its context"
        return self._lock

    def _release(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            left = any(path.exists() for path in (self.stages, self.path, self._replaced, self.journal))
            lock.release(keep_note=left and lock.publication() is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def publish_file(
    path: Path | str, content: bytes | Callable[[Path], None], *, inputs: Iterable[Path | str] = ()
) -> Path:
    """Writes one file beside its target and gives it its name in one step, replacing a file that is there.

    Args:
        path: the file that is asked for.
        content: its bytes, or a function that writes them to the path it is given.
        inputs: files and folders that the command reads, of which `path` must be none.

    Raises:
        OutputError: the target is a folder, a link or an input, another run writes it, or the disk fails.
    """
    out = Path(os.path.abspath(path))
    check_target(out, inputs, folder=False)
    partial = out.with_name(f".{out.name}.partial")
    with OutputLock(out), disk_errors(out):
        try:
            if isinstance(content, bytes):
                partial.write_bytes(content)
            else:
                content(partial)
            sync_path(partial)
            os.replace(partial, out)
            sync_path(out.parent)
        finally:
            partial.unlink(missing_ok=True)
    return out


def sync_tree(folder: Path) -> None:
    """Waits until a folder and everything below it is on the medium."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        else:
            sync_path(entry)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Waits until one file, or the names in one folder, are on the medium."""
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _inode(path: Path) -> int:
    """The inode number of what a path names, or -1 if there is nothing."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_ino
    return -1


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
