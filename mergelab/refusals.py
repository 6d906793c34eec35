"""What the operating system refuses (space, rights, descriptors, memory), in words with a remedy.

Python, Orbax, TensorStore, safetensors and XLA raise many types for the same few refusals; some carry the
error number, others only quote the system's sentence. `refusal` knows both.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from mergelab.errors import shortened

__all__ = ["one_line", "refusal", "refused_file"]

_FULL = ("the disk is full", "free some space or choose another disk, then run the command again")
_RIGHTS = ("permission is denied", "change its permissions or choose another place")
_DESCRIPTORS = ("too many files are open", "raise the limit (ulimit -n) and run the command again")
_MEMORY = (
    "there is not enough memory",
    "close other programs, give the command less at once, or use a larger machine",
)

_REASONS: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another disk, then run it again"),
    errno.EFBIG: (
        "the file is larger than the disk or a limit allows",
        "raise the limit (ulimit -f) or write smaller files",
    ),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("it is a folder, not a file", "check the path"),
    errno.EEXIST: ("it exists already", "choose another name or remove it"),
    errno.ENOTEMPTY: ("the folder is not empty", "choose another name or remove it"),
    errno.ELOOP: ("symbolic links lead in a circle", "check the links of the path"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter one"),
    errno.EXDEV: ("two places that must be on one disk are not", "choose another place"),
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: _DESCRIPTORS,
    errno.ENOMEM: _MEMORY,
    errno.EIO: ("the disk or the network fails (input/output error)", "check the disk and run it again"),
    errno.ESTALE: ("the network disk lost the file (stale handle)", "run the command again"),
    errno.EBUSY: ("the file or device is in use", "wait for what uses it and run the command again"),
}

# What libraries write where they do not quote the system; "RESOURCE_EXHAUSTED" alone may mean a disk.
_MEMORY_WORDS = (
    "out of memory", "failed to allocate", "unable to allocate", "bad_alloc", "can't start new thread",
)  # fmt: skip


def refusal(error: BaseException) -> str | None:
    """Returns what was refused and what to do, as `"the disk is full; free ..."`; None for other errors.

    Args:
        error: any exception. Its number counts, else the system's own sentence in its text.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EPIPE:
        known = _REASONS.get(error.errno)
        return "; ".join(known) if known else one_line(error.strerror or str(error))
    text = str(error)
    if isinstance(error, MemoryError):
        detail = f" ({one_line(text)})" if text else ""
        return f"{_MEMORY[0]}{detail}; {_MEMORY[1]}"
    for number, reason in _REASONS.items():
        if os.strerror(number) in text:
            return "; ".join(reason)
    if any(word in text.lower() for word in _MEMORY_WORDS):
        return f"{_MEMORY[0]} ({one_line(text)}); {_MEMORY[1]}"
    return None


def refused_file(error: BaseException) -> str | None:
    """The file that an exception of the operating system names, shortened; None if it names none."""
    name = getattr(error, "filename", None) if isinstance(error, OSError) else None
    if not isinstance(name, str | bytes) or not name:
        return None
    return one_line(os.fsdecode(name), 200)


def one_line(text: str, limit: int = 300) -> str:
    """Returns text without line breaks, its middle omitted where it is longer than `limit` characters."""
    return shortened(" ".join(text.split()), limit)
