"""Small text files, read within bounds; Git LFS pointers and web pages are told from content."""

from __future__ import annotations

import os
import re
import stat

from mergelab.errors import CheckpointError, MergelabError, shortened

__all__ = [
    "MAX_PROSE",
    "MAX_SETTINGS",
    "MAX_TABLE",
    "PAGE_BYTES",
    "POINTER_BYTES",
    "is_web_page",
    "read_bytes",
    "read_text",
    "refuse_pointer",
]


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


PAGE_BYTES = 4 * 2**20
"""Web pages that a download leaves in place of a file are shorter than this."""
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)


def is_web_page(start: bytes) -> bool:
    """Whether a file that should hold something else begins as a web page, or a server's XML, does."""
    return _PAGE.match(start) is not None


MAX_SETTINGS = 64 * 2**20
"""Bytes of the largest file of settings that is read: a `config.json`, an index, a recipe."""

MAX_TABLE = 256 * 2**20
"""Bytes of the largest file that lists tokens: a `tokenizer.json`."""

MAX_PROSE = 2**30
"""Bytes of the largest file of text for a model to read; more is given as several files."""


def read_bytes(
    path: str | os.PathLike[str], limit: int = MAX_SETTINGS, *, error: type[MergelabError] = CheckpointError
) -> bytes:
    """Returns what is in a regular file of at most `limit` bytes.

    A pipe, a device or a folder is refused and not opened for good: reading one may never end.

    Raises:
        MergelabError: `error`, if the file is missing, of another kind, too large, or cannot be read.
        CheckpointError: the file is a Git LFS pointer.
    """
    place = shortened(str(path), 200)
    try:
        # Without O_NONBLOCK, opening a pipe waits until someone writes to it.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(file, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            regular = stat.S_ISREG(status.st_mode)
            # A file of the kernel's has size 0 and yet content, so the size alone is not a bound.
            found = _read(stream.fileno(), limit + 1) if regular and status.st_size <= limit else b""
    except FileNotFoundError:
        raise error(f"{place} cannot be read: it does not exist; check the path") from None
    except IsADirectoryError:
        raise error(f"{place} cannot be read: it is a folder; give a regular file") from None
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "its name is not a file name"
        raise error(f"{place} cannot be read ({reason})") from None
    if not regular:
        raise error(f"{place} cannot be read: it is {_kind(status.st_mode)}; give a regular file")
    size = max(status.st_size, len(found))
    if size > limit:
        raise error(
            f"{place} has {size:,} bytes, more than the {limit:,} that are read of such a file; check that "
            "it is the right one"
        )
    refuse_pointer(found, place)
    return found


def read_text(
    path: str | os.PathLike[str],
    limit: int = MAX_SETTINGS,
    *,
    error: type[MergelabError] = CheckpointError,
    errors: str = "strict",
) -> str:
    """Returns the text of a UTF-8 file, whatever the locale; a byte order mark is dropped, CRLF becomes LF.

    Args:
        path: the file.
        limit: the bytes it may have.
        error: what is raised.
        errors: what happens to bytes that are not UTF-8: `strict` refuses them, `replace` marks them.

    Raises:
        MergelabError: `error`, as from `read_bytes`, or if the file is not UTF-8 text.
    """
    raw = read_bytes(path, limit, error=error)
    try:
        text = raw.decode("utf-8-sig", errors)
    except UnicodeDecodeError as failure:
        place = shortened(str(path), 200)
        raise error(
            f"{place} cannot be read as UTF-8 text (byte {failure.start:,}); save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(file: int, count: int) -> bytes:
    """The next bytes, `count` at most: a single read returns as few as it likes."""
    parts: list[bytes] = []
    while count > 0 and (part := os.read(file, min(count, 2**24))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
