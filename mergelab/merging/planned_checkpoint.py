"""A checkpoint that does not exist yet: what a plan will write, so that further plans can build on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError
from mergelab.merging.job import Job

__all__ = ["PlannedCheckpoint"]


@dataclass(frozen=True)
class _PlannedTensor:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read_into(self, start: int, out: np.ndarray) -> None:
        raise CheckpointError(f"tensor {self.name!r} belongs to a merge that has not run yet; run that first")


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A `Checkpoint` of tensors that can be planned with but not read.

    Attributes:
        path: a folder with the planned config and tokenizer files.
        config: the planned `config.json`.
        tensors: by name.
        identity: the plan's.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSource]
    identity: str

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        jobs: Iterable[Job],
        identity: str,
    ) -> PlannedCheckpoint:
        """Writes a plan's small files to `folder`, which must not exist; the jobs name its tensors."""
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {job.name: _PlannedTensor(job.name, job.shape, job.dtype) for job in jobs}
        return cls(folder, config, tensors, identity)
