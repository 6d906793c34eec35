"""Writes one checkpoint from one or several processes, each putting its own ranges into preplanned files."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from mergelab.checkpoints.model_files import put_file
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.shard_plan import ShardPlan
from mergelab.errors import OutputError
from mergelab.platform import reserve, write_at
from mergelab.processes.agreement import together

__all__ = ["SharedWriter"]


class SharedWriter:
    """A context manager; `write_runs` may be called from several threads, all else by every process alike.

    Process 0 makes the work folder beside the target, with files of their final size, and gives it its final
    name in `commit`; left without that, it deletes the folder. Unlike `CheckpointWriter` it keeps no
    receipts: what it writes is in memory, and is written again after a failure.

    Attributes:
        plan: the layout.
    """

    def __init__(
        self,
        out: Path | str | WorkFolder,
        plan: ShardPlan,
        *,
        identity: str = "",
        overwrite: bool = False,
        distributed: bool = False,
    ) -> None:
        """Prepares the files.

        Args:
            out: the target folder, which all processes see, and whose parents are created; or the work folder
                of one, which the caller has entered (in process 0) and leaves.
            plan: the layout.
            identity: SHA-256 of all that decides the content, for the note of its publication.
            overwrite: replace a non-empty target that mergelab wrote; the old folder stays until the new one
                is complete.
            distributed: every process of the run writes a share; otherwise this one writes everything.

        Raises:
            OutputError: the target is not empty, the disk is too small or fails, or another run writes there.
            MeshError: that happened in another process.
        """
        self.plan = plan
        self._distributed = distributed
        self._first = not distributed or jax.process_index() == 0
        self._work = out if isinstance(out, WorkFolder) else WorkFolder(out, overwrite=overwrite)
        self._identity = identity
        self._owned = None if isinstance(out, WorkFolder) else contextlib.ExitStack()
        self._begun = False
        self._files: list[int] = []
        self._written = 0
        self._lock = threading.Lock()
        try:
            with together("preparing the output", distributed=distributed), self._disk_errors():
                if self._first:
                    self._prepare()
            with together("opening the output", distributed=distributed), self._disk_errors():
                self._files = [os.open(self._work.path / shard.file, os.O_WRONLY) for shard in plan.shards]
        except BaseException:
            self._abandon()
            raise

    def _prepare(self) -> None:
        if self._owned is not None:
            self._owned.enter_context(self._work)
        self._work.prepare(self.plan.nbytes)
        self._work.clear()
        self._begun = True
        for shard in self.plan.shards:
            with open(self._work.path / shard.file, "wb") as file:
                file.write(shard.head)
                file.flush()
                reserve(file.fileno(), shard.size)

    def write_runs(self, name: str, starts: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        """Writes row `i` of `rows` to the flat elements of a tensor from `starts[i]` on.

        Args:
            name: the tensor's name in the plan.
            starts: the first element of each run.
            rows: `[runs, length]`, contiguous, of the tensor's dtype. No element may be written twice.

        Raises:
            OutputError: the disk is full or fails.
        """
        place = self.plan.places[name]
        if rows.dtype != place.spec.dtype or not rows.flags.c_contiguous:
            raise ValueError(f"tensor {name!r} is written as contiguous {place.spec.dtype}, not {rows.dtype}")
        with self._disk_errors():
            for start, row in zip(starts, rows.view(np.uint8), strict=True):
                write_at(self._files[place.shard], row.data, place.offset + int(start) * rows.itemsize)
        with self._lock:
            self._written += rows.nbytes

    def commit(self, files: Mapping[str, bytes | Path]) -> Path:
        """Adds further files (config, tokenizer), gives the folder its final name, and returns it.

        Raises:
            OutputError: not every byte was written once, or the disk is full or fails.
            CheckpointError: a file's name is not one plain name.
            MeshError: that happened in another process.
        """
        with together("completing the output", distributed=self._distributed), self._disk_errors():
            self._close()
        written = self._written
        if self._distributed:
            counts = multihost_utils.process_allgather(
                np.array([written >> 24, written & 0xFFFFFF], np.int32)
            )
            written = sum((int(high) << 24) + int(low) for high, low in np.asarray(counts))
        with together("completing the output", distributed=self._distributed), self._disk_errors():
            if written != self.plan.total_size:
                raise OutputError(
                    f"{self._work.out}: {written} of {self.plan.total_size} bytes of weights were written; a "
                    "parameter has parts on devices of no process of this run."
                )
            if self._first:
                self._complete(files)
        return self._work.out

    def _complete(self, files: Mapping[str, bytes | Path]) -> None:
        weights = {shard.file for shard in self.plan.shards}
        for name, content in files.items():
            if name in weights:
                raise OutputError(f"the file {name!r} would replace the weights; choose another name.")
            put_file(self._work.path, name, content)
        if self.plan.index is not None:
            (self._work.path / "model.safetensors.index.json").write_bytes(self.plan.index)
        self._work.publish(self._identity)
        self._begun = False

    def _close(self) -> None:
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def _abandon(self) -> None:
        self._close()
        if self._begun:
            self._begun = False
            self._work.clear(recreate=False)
        if self._owned is not None:
            self._owned.close()

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self._work.out, "save again; every process must see this folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()
