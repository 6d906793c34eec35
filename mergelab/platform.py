"""What differs between operating systems: usable cores, file locks, positions in files, exchange of paths."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "DELETES_OPEN_FILES",
    "cpu_kind",
    "exchange",
    "keep_freed_memory",
    "read_at",
    "reserve",
    "trim_memory",
    "try_lock",
    "usable_cores",
    "write_at",
    "writing_fault",
]

DELETES_OPEN_FILES = sys.platform != "win32"
"""Whether a file that is open, or mapped, can be deleted."""

_CURRENT_FOLDER = -100 if sys.platform == "linux" else -2  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS

_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_HELD_ELSEWHERE = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}

_LOCKED_BYTE = 2**30
"""Where Windows locks: far behind the content, since a byte locked there cannot be read by others."""


_MOST_AT_ONCE = 2**30
"""Bytes of one read or write: macOS refuses 2 GiB and more in one call."""


def usable_cores() -> int:
    """Cores this process may use: those of its affinity where the system knows one, else all; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def cpu_kind() -> str:
    """Digest of what the processor is and can do: equal where the same compiled programs run."""
    described = [platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 16).split("\n\n")[0]
        keys = ("flags", "features", "model name", "cpu part", "isa")
        described += [line for line in first.splitlines() if line.lower().startswith(keys)]
    except OSError:
        described.append(platform.processor())
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def trim_memory() -> None:
    """Gives memory that is free in the heap back to the system, where the C library (glibc) can be told to.

    A compiler or a parser leaves a hundred megabytes behind that nothing else may ever need.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The parameters' numbers in `malloc.h`."""


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    # Looked up once: a library that is opened anew each time leaves a little behind each time.
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Lets the C library (glibc) keep what is freed for the next allocation, in a process of one purpose.

    A stream of blocks frees and takes the same tens of megabytes again and again; by default each goes back
    to the system, which hands out and clears every page anew.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc allows
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


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


def writing_fault() -> str | None:
    """Why this system cannot write models, in a sentence with its cure; None where it can."""
    if hasattr(os, "pwrite"):
        return None
    return (
        "models, features and reports are written from several threads at once, for which this system "
        f"({sys.platform}) has no os.pwrite; run mergelab under WSL (wsl --install)"
    )


def read_at(file: int, out: memoryview, offset: int) -> int:
    """Reads bytes from `offset` on into `out`; may read fewer than fit.

    Where the system cannot read at a position, the file's own position is moved: such a file is
    for one thread.

    Raises:
        OSError: the disk fails.
    """
    out = out[:_MOST_AT_ONCE]
    if hasattr(os, "preadv"):
        return os.preadv(file, [out], offset)
    if hasattr(os, "pread"):
        data = os.pread(file, len(out), offset)
    else:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(out))
    out[: len(data)] = data
    return len(data)


def write_at(file: int, data: memoryview | bytes, offset: int) -> None:
    """Writes all bytes of `data` from `offset` on; the file's own position stays, so threads may share it.

    Raises:
        OSError: the disk is full or fails.
    """
    rest = memoryview(data)
    while len(rest):
        count = os.pwrite(file, rest[:_MOST_AT_ONCE], offset)
        rest, offset = rest[count:], offset + count


def reserve(file: int, size: int) -> None:
    """Gives a file its size and, where the system can, its blocks, so that a full disk shows now.

    Raises:
        OSError: the disk is too small or fails.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    os.ftruncate(file, size)


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
