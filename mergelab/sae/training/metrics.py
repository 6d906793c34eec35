"""Metrics of a training, as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MetricsFile", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut short by a kill is left away."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsFile:
    """Appends one line per logged step.

    Args:
        path: the file; lines of steps after `step` are dropped, so that none appears twice after a resume.
        step: the step the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        self._file = path.open("w")
        for line in kept:
            self.write(line)

    def write(self, line: Mapping[str, float]) -> None:
        """One line, on disk when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
