"""The folder an output is made in, beside its target, and the renames that give it its final name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mergelab.errors import OutputError

__all__ = ["WorkFolder"]


class WorkFolder:
    """Names and moves for a target `name`: `.name.partial`, `.name.journal`, `.name.replaced` beside it."""

    def __init__(self, out: Path) -> None:
        """Derives the names; touches nothing."""
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self.journal = self.out.with_name(f".{self.out.name}.journal")
        self.replaced = self.out.with_name(f".{self.out.name}.replaced")

    def prepare(self, needed: int, *, resume: bool, overwrite: bool) -> None:
        """Checks that the target may be made and that the disk holds `needed` bytes.

        Raises:
            OutputError: the target is a file or a non-empty folder, or the disk is too small.
            OSError: the file system refuses.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._recover(resume)
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; choose a folder for the model")
        if not overwrite and self.out.is_dir() and any(self.out.iterdir()):
            raise OutputError(f"{self.out} is not empty; choose another folder or pass --overwrite")
        free = shutil.disk_usage(self.out.parent).free + self._allocated()
        if free < needed:
            raise OutputError(
                f"{self.out}: the model needs {needed / 1e9:.3f} GB but only {free / 1e9:.3f} GB are free; "
                "free some space or choose another disk"
            )

    def _recover(self, resume: bool) -> None:
        """Repairs what a run killed between the renames of `publish` left behind."""
        if self.replaced.is_dir():
            if self.out.exists():
                shutil.rmtree(self.replaced)
            else:
                self.replaced.rename(self.out)
        if resume and self.journal.is_file() and self.out.is_dir() and not self.path.exists():
            # Complete and renamed, but the journal was not yet removed: take it up again and verify it.
            self.out.rename(self.path)

    def _allocated(self) -> int:
        if not self.path.is_dir():
            return 0
        return sum(entry.stat().st_blocks * 512 for entry in self.path.iterdir())

    def clear(self, *, recreate: bool = True) -> None:
        """Deletes the work folder with all in it, and makes an empty one."""
        if self.path.exists():
            shutil.rmtree(self.path)
        if recreate:
            self.path.mkdir()

    def keep_only(self, names: Iterable[str]) -> None:
        """Deletes every file that is not one of `names`: an earlier run's config or index."""
        kept = set(names)
        for entry in self.path.iterdir():
            if entry.name not in kept:
                entry.unlink()

    def publish(self, *, durable: bool) -> None:
        """Renames the work folder to the target, moving an old target aside first and deleting it after."""
        if durable:
            for entry in self.path.iterdir():
                _sync(entry)
            _sync(self.path)
        if self.out.is_dir():
            self.out.rename(self.replaced)
        self.path.rename(self.out)
        if durable:
            _sync(self.out.parent)
        if self.replaced.is_dir():
            shutil.rmtree(self.replaced)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
