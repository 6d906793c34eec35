"""The machine and the versions behind a measurement, in plain data."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

__all__ = ["describe"]


def describe(folder: Path) -> dict[str, str]:
    """Processor, memory, the file system under `folder`, and the versions that matter."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "processor": processor[1].strip() if processor else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "file system": _file_system(folder),
        "python": platform.python_version(),
        "jax": version("jax"),
        "numpy": version("numpy"),
    }


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    parents = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    under = [(len(mount[1]), mount[2]) for mount in mounts if mount[1] in parents]
    return max(under)[1] if under else "unknown"
