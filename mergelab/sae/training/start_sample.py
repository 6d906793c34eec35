"""The start sample of a run, kept in its folder: what a run that is resumed need not read again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations import ActivationStream, Batch
from mergelab.activations.lane_rows import LaneStream
from mergelab.activations.left_out import LeftOut
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.new_files import write_tensors
from mergelab.checkpoints.publish import sync_path
from mergelab.checkpoints.safetensors_file import open_safetensors
from mergelab.errors import CheckpointError
from mergelab.processes.exchange import gathered_facts
from mergelab.sae.training.overview import Overview

__all__ = ["START_SAMPLE", "StartSample", "kept_overview"]

START_SAMPLE = "start.safetensors"
"""The file in a run's folder."""

_OVERVIEW, _DIGEST = "overview", "sha256"


@dataclass(frozen=True)
class StartSample:
    """Rows drawn before the first step, and what they look like.

    Attributes:
        batch: the rows.
        overview: the figures.
    """

    batch: Batch
    overview: Overview

    def write(self, folder: Path) -> None:
        """Keeps the sample in a run's folder; it has its name when it is whole.

        Raises:
            OSError: the file system refuses.
        """
        tensors = {"input": self.batch.input, "rows": self.batch.rows}
        if self.batch.target is not self.batch.input:
            tensors["target"] = self.batch.target
        facts = asdict(self.overview)
        facts["limit"] = facts["limit"] if math.isfinite(facts["limit"]) else None  # JSON has no infinity
        facts["sampled"]["places"] = sorted(self.overview.sampled.places.items())
        partial = folder / f".{START_SAMPLE}.partial"
        try:
            write_tensors(partial, tensors, {_OVERVIEW: json.dumps(facts), _DIGEST: _digest(tensors)})
            sync_path(partial)
            os.replace(partial, folder / START_SAMPLE)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, overview: Overview) -> StartSample | None:
        """The sample of a run's folder, whose overview is known; None if its rows are damaged."""
        try:
            found = open_safetensors(folder / START_SAMPLE)
            tensors = {}
            for name, tensor in found.tensors.items():
                tensors[name] = np.empty(tensor.shape, tensor.dtype)
                tensor.read_into(0, tensors[name].reshape(-1))
            if found.metadata[_DIGEST] != _digest(tensors):
                return None
            x = tensors["input"]
            return cls(Batch(x, tensors.get("target", x), tensors["rows"]), overview)
        except (CheckpointError, KeyError):
            return None


def kept_overview(folder: Path, stream: ActivationStream | LaneStream, tokens: int) -> Overview | None:
    """What the start sample in a run's folder looks like, without reading its rows; None if there is none.

    Process 0 looks, and tells the others.

    Args:
        folder: the run's folder.
        stream: the training's, whose number of rows may have grown since.
        tokens: rows of the whole training.
    """
    import jax

    facts = gathered_facts(_kept_facts(folder) if jax.process_index() == 0 else None)[0]
    if facts is None:
        return None
    if facts["limit"] is None:
        facts["limit"] = math.inf
    now = {"rows": stream.source.rows, "kept_rows": stream.rows, "epochs": tokens / stream.rows}
    places = Counter({int(place): int(count) for place, count in facts["sampled"].pop("places")})
    return Overview(**{**facts, **now, "sampled": LeftOut(**facts["sampled"], places=places)})


def _kept_facts(folder: Path) -> dict[str, Any] | None:
    try:
        text = open_safetensors(folder / START_SAMPLE).metadata[_OVERVIEW]
        facts = parse_json_object(text.encode(), str(folder / START_SAMPLE))
    except (CheckpointError, KeyError):
        return None
    known = {"sampled", *(one.name for one in fields(Overview))}
    return facts if set(facts) == known else None  # of another version


def _digest(tensors: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()
