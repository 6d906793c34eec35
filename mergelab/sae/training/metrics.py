"""Metrics of a training, as lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from mergelab.checkpoints.manifest import write_whole
from mergelab.checkpoints.output_target import disk_errors

__all__ = ["MetricsFile", "read_metrics"]

_THEN = "go on with --resume"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file as far as they are whole; a kill may cut the last one short."""
    lines: list[dict[str, float]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(said, dict) or not isinstance(said.get("step"), int):
            break
        lines.append(said)
    return lines


class MetricsFile:
    """Appends one line per logged step.

    Args:
        path: the file; lines of steps after `step` are dropped, so that none appears twice after a resume.
        step: the step the run goes on from.

    Raises:
        OutputError: the disk is full or fails; every method but `close` can say so.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        with disk_errors(path, _THEN):
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, float]) -> None:
        """One line, in the file when this returns."""
        with disk_errors(self._path, _THEN):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the medium: after a checkpoint none is written again."""
        with disk_errors(self._path, _THEN):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # what could not be written was said by `write`
            self._file.close()
