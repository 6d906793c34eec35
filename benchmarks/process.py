"""Runs a whole process, start-up included, and measures its wall time and peak anonymous memory."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "measure"]

_INTERVAL = 0.01


@dataclass(frozen=True)
class Measured:
    """One run of a program.

    Attributes:
        seconds: from before its start to after its end.
        peak_anonymous: the most bytes of memory of its own (heap and buffers, not the page cache behind
            mapped files) that it and its children held, sampled every 10 ms.
        stdout: what it printed.
    """

    seconds: float
    peak_anonymous: int
    stdout: str


def measure(command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> Measured:
    """Runs `command` to its end.

    Raises:
        RuntimeError: it failed; the message holds the end of what it wrote to stderr.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    finished, peak = threading.Event(), [0]

    def watch() -> None:
        while not finished.wait(_INTERVAL):
            peak[0] = max(peak[0], sum(map(_anonymous, _family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - started
    finished.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n{stderr[-3000:]}")
    return Measured(seconds, peak[0], stdout)


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in threads for child in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return
    for child in children:
        yield from _family(child)


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
