"""Git LFS pointers: the few lines of text that stand in a clone where a large file was not fetched."""

from __future__ import annotations

from mergelab.errors import CheckpointError

__all__ = ["POINTER_BYTES", "refuse_pointer"]

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024
"""Pointers are shorter than this (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def refuse_pointer(start: bytes, place: str) -> None:
    """Checks that a file is not a pointer; `start` is how it begins, `place` its name for the message.

    Raises:
        CheckpointError: it is one.
    """
    if start.startswith(_FIRST_LINE):
        raise CheckpointError(
            f"{place} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or "
            "download the file"
        )
