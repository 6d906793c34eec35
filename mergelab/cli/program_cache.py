"""The folder of compiled programs: one for each version of jax and kind of CPU, within a bound in all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mergelab.platform import cpu_kind

__all__ = ["MOST_BYTES", "program_cache"]

MOST_BYTES = 2**30
"""What the folders of all versions and CPUs may hold; beyond it, those least recently used go first."""


def program_cache(jax_version: str) -> Path:
    """The folder in which JAX keeps what it compiles for this machine.

    A program holds instructions that another CPU may lack, and home folders are shared by machines. Entries
    are removed where there are too many.

    Args:
        jax_version: the version of jax, which reads no other's programs.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergelab" / "xla"
    with contextlib.suppress(OSError):
        _prune(root)
    return root / f"jax-{jax_version}-{cpu_kind()}"


def _prune(root: Path) -> None:
    """Removes the least recently used programs until three quarters of the bound are left."""
    found: list[tuple[float, int, str]] = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):  # another process removes entries as well
                status = os.stat(path)
                found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    held = sum(size for _, size, _ in found)
    if held <= MOST_BYTES:
        return
    for _, size, path in sorted(found):
        if held <= MOST_BYTES * 3 // 4:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        held -= size
