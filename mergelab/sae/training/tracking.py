"""Metrics of a training run: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergelab.checkpoints.manifest import write_whole
from mergelab.checkpoints.output_target import disk_errors
from mergelab.errors import DependencyError

__all__ = ["LOGGERS", "Logger", "MetricsFile", "open_loggers", "read_metrics"]


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


class Logger(Protocol):
    """Takes the metrics of logged steps."""

    def write(self, line: Mapping[str, float]) -> None:
        """Metrics of the step `line["step"]`."""
        ...

    def close(self) -> None:
        """Called once, also when the training fails."""
        ...


class _TensorBoard:
    """Event files in `OUT/tensorboard`."""

    def __init__(self, out: Path, config: Mapping[str, Any], step: int) -> None:
        package = _package("tensorboardX", "tensorboard")
        # What an interrupted run wrote after the step it goes on from is hidden.
        self._writer = package.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, int(line["step"]))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run in the project that `WANDB_PROJECT` names, with the configuration; resumed under the same id."""

    def __init__(self, out: Path, config: Mapping[str, Any], step: int) -> None:
        package = _package("wandb", "wandb")
        written = out / "wandb-id"
        known = written.read_text().strip() if step and written.is_file() else None
        self._run = package.init(
            dir=str(out), name=out.name, config=dict(config), id=known, resume="allow" if known else None
        )
        with disk_errors(out):
            write_whole(written, f"{self._run.id}\n")

    def write(self, line: Mapping[str, float]) -> None:
        values = {f"train/{name}": value for name, value in line.items() if name != "step"}
        self._run.log(values, step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()


def _package(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"log_to names {extra}, whose package {module} is not installed; install mergelab[{extra}], or "
            f"just that: pip install {module}"
        ) from error


LOGGERS = {"tensorboard": _TensorBoard, "wandb": _WandB}
"""Loggers by the name a configuration gives them."""


def open_loggers(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """The loggers of a run.

    Args:
        names: names of `LOGGERS`.
        out: the run's folder.
        config: configuration, shown with the curves.
        step: the step the run goes on from.

    Raises:
        DependencyError: a package is not installed.
    """
    return [LOGGERS[name](out, config, step) for name in names]
