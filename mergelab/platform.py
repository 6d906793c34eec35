"""What differs between operating systems: cores this process may use, file locks, exchange of two paths."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["exchange", "try_lock", "usable_cores"]

_CURRENT_FOLDER = -100 if sys.platform == "linux" else -2  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS

_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_HELD_ELSEWHERE = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}

_LOCKED_BYTE = 2**30
"""Where Windows locks: far behind the content, since a byte locked there cannot be read by others."""


def usable_cores() -> int:
    """Cores this process may use: those of its affinity where the system knows one, else all; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def try_lock(fd: int) -> bool:
    """Takes an exclusive lock on an open file without waiting; it is released when the file is closed.

    The lock dies with the process, however it ends. Where the file system (as on some network disks) or the
    operating system has no locks, nothing is locked and the answer is True.

    Args:
        fd: a file open for writing.

    Returns:
        False if another opening of the file holds the lock, in this process or in another one.

    Raises:
        OSError: `fd` is not an open file.
    """
    try:
        _lock(fd)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _lock(fd: int) -> None:
    """Locks by whatever there is, if there is anything."""
    try:
        import fcntl
    except ImportError:
        _lock_on_windows(fd)
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_on_windows(fd: int) -> None:
    try:
        import msvcrt
    except ImportError:
        return
    place = os.lseek(fd, 0, os.SEEK_CUR)
    os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        os.lseek(fd, place, os.SEEK_SET)


def exchange(a: Path, b: Path) -> bool:
    """Makes each of two paths name what the other named, in one step that no crash can halve.

    Both must exist, on one file system; files, folders and links may be exchanged for each other.

    Returns:
        False, with nothing changed, where the operating system or the file system has no such step.

    Raises:
        OSError: a path is missing, not writable, or on another file system.
    """
    rename = _rename_with_flags()
    if rename is None:
        return False
    names = os.fsencode(a), os.fsencode(b)
    if rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


@functools.cache
def _rename_with_flags() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The C library's rename that takes flags, or None where it has none."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    if name is None:
        return None
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):  # a C library older than the call
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call
