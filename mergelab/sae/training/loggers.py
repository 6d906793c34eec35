"""Other places a training's metrics go to besides its own file: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergelab.checkpoints.manifest import write_whole
from mergelab.checkpoints.output_target import disk_errors
from mergelab.errors import DependencyError

__all__ = ["LOGGERS", "Logger", "open_loggers"]


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
            f"log_to names {extra}, whose package {module} is not installed; install mergelab[{extra}]."
        ) from error


LOGGERS = {"tensorboard": _TensorBoard, "wandb": _WandB}
"""Loggers by the name a configuration gives them."""


def open_loggers(names: Sequence[str], out: Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """The loggers of a run.

    Args:
        names: of `LOGGERS`.
        out: the run's folder.
        config: what is being trained, to be shown beside the curves.
        step: the step the run goes on from.

    Raises:
        DependencyError: a package is not installed.
    """
    return [LOGGERS[name](out, config, step) for name in names]
