"""A checkpoint that does not exist yet: what a plan will write, so that further plans can build on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError

if TYPE_CHECKING:
    from mergelab.merging.plan import Plan

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
    def of(cls, plan: Plan, folder: Path) -> PlannedCheckpoint:
        """Writes the plan's small files to `folder`, which must not exist."""
        folder.mkdir(parents=True)
        for name, content in plan.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(plan.config))
        tensors = {job.name: _PlannedTensor(job.name, job.shape, job.dtype) for job in plan.jobs}
        return cls(folder, plan.config, tensors, plan.identity)
