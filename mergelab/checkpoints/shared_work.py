"""A work folder in which all processes of a run write, and which one of them locks and publishes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from mergelab.checkpoints.publish import WorkFolder
from mergelab.processes.agreement import agree, together

__all__ = ["SharedWorkFolder"]


class SharedWorkFolder(WorkFolder):
    """A `WorkFolder` on a file system that all processes of a run see; every process makes the same calls.

    Process 0 holds the lock, prepares and publishes; what fails there fails in all. A single process has a
    plain work folder.
    """

    def __init__(
        self, out: Path | str, *, inputs: Iterable[Path | str] = (), overwrite: bool = False
    ) -> None:
        """Derives the names; arguments are those of `WorkFolder`."""
        super().__init__(out, inputs=inputs, overwrite=overwrite)
        self._distributed, self._first = jax.process_count() > 1, jax.process_index() == 0

    def __enter__(self) -> Self:
        """Checks the target and takes the lock, in process 0.

        Raises:
            OutputError: the target may not be written, or another run is writing it.
            MeshError: that happened in another process.
        """
        with together("opening the output", distributed=self._distributed):
            if self._first:
                super().__enter__()
        return self

    def finished(self, identity: str) -> bool:
        """Whether the same work has given the output its name: the answer of process 0."""
        return bool(agree(int(super().finished(identity)), distributed=self._distributed))

    def prepare(self, needed: int = 0) -> None:
        """Checks target and disk as `WorkFolder.prepare` does, in process 0."""
        with together("preparing the output", distributed=self._distributed):
            if self._first:
                super().prepare(needed)

    def publish(self, identity: str, *, durable: bool = True) -> Path:
        """Gives the work folder its final name, in process 0; all wait for it."""
        with together("publishing the output", distributed=self._distributed):
            return super().publish(identity, durable=durable) if self._first else self.out

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first:
            super().__exit__(kind, error, trace)
