"""The difference of two checkpoints as a sparse task vector: each tensor's largest changes."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import (
    FolderCheckpoint,
    TensorSource,
    dtype_from_name,
    is_float,
    open_checkpoint,
    read_whole,
)
from mergelab.checkpoints.folder import bounded_digest
from mergelab.checkpoints.hub import hub_origin
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.sparse_delta import DELTA_CONFIG, DELTA_STEM, pack_delta
from mergelab.checkpoints.writer import identity_digest
from mergelab.errors import CheckpointError, NonFiniteError, OperatorError, did_you_mean
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.output_folder import write_model
from mergelab.operators.order_statistics import kept_count, select_on_host
from mergelab.version import __version__

__all__ = ["ExtractedDelta", "extract_delta"]

_PIECE = 1 << 20


@dataclass(frozen=True)
class ExtractedDelta:
    """What an extraction wrote.

    Attributes:
        out: Folder of the sparse task vector.
        kept: Number of entries that are stored, of each changed tensor.
        entries: Number of entries of the changed tensors together.
        nbytes: Size of the weight file.
        model_bytes: Size of the fine-tuned model, which base and task vector make again.
    """

    out: Path
    kept: Mapping[str, int]
    entries: int
    nbytes: int
    model_bytes: int


@writes_anywhere()
def extract_delta(
    finetuned: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    density: float,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> ExtractedDelta:
    """Writes the sparse task vector from `base` to `finetuned`; `base+out` is the model it makes.

    Of each changed tensor the `max(1, int(density * n))` entries that change most are kept, ties going to the
    lowest index, as `ties` and `ops.Trim` keep them: a bit per entry says which, and their values follow.
    What did not change is omitted. One tensor is in memory at a time.

    Args:
        finetuned: Folder or weight file of the fine-tuned model.
        base: Folder or weight file of the model it was tuned from.
        out: Folder to write.
        density: Fraction of each tensor's entries to keep, above 0 and at most 1.
        dtype: Stored dtype of the changes.
        overwrite: Whether a non-empty `out` that mergelab wrote may be replaced.
        progress: Function called with the number of bytes just written.

    Raises:
        CheckpointError: the models' tensors differ in names, shapes or kind, or nowhere in their values.
        NonFiniteError: a difference is NaN or infinite.
        OperatorError: `density` is out of its range.
        OutputError: the folder cannot be written.
    """
    if not 0 < density <= 1:
        raise OperatorError(
            f"the density is {density!r} where a fraction above 0 and at most 1 was expected."
        )
    tuned_model, base_model = open_checkpoint(finetuned), open_checkpoint(base)
    stored = dtype_from_name(dtype)
    alone = threading.Lock()
    jobs: list[Job] = []
    shapes: dict[str, list[int]] = {}
    kept: dict[str, int] = {}
    for name, (tuned, old) in _paired(tuned_model, base_model).items():
        if not _differs(tuned, old):
            continue
        size = math.prod(old.shape)
        shapes[name], kept[name] = list(old.shape), kept_count(density, size, at_least=1)
        change = _Change(tuned, old, kept[name], stored, alone)
        for part, shape, kind in ((".mask", (-(-size // 8),), np.uint8), (".values", (kept[name],), stored)):
            source = _ChangePart(f"{name}{part}", shape, np.dtype(kind), change, part)
            jobs.append(Job(source.name, shape, source.dtype, (source,)))
    if not jobs:
        raise CheckpointError(f"{finetuned} has the values of {base}; there is nothing to extract")
    origin = hub_origin(base_model.path)
    config = {
        "format": "mergelab sparse task vector 1",
        "base_model_name_or_path": str(base) if origin is None else origin.repo,
        "density": density,
        "shapes": shapes,
    }
    models = (tuned_model, base_model)
    values = [bounded_digest(file.file.path, 1 << 24) for model in models for file in model.files]
    identity = {
        "settings": f"{density} {stored}",
        "models": " ".join([*(model.fingerprint() for model in models), *values]),
    }
    entries = sum(math.prod(shape) for shape in shapes.values())
    model_bytes = tuned_model.model_bytes
    with WorkFolder(out, inputs=[finetuned, base], overwrite=overwrite) as work:
        if work.finished(identity_digest(identity)):
            nbytes = (Path(out) / f"{DELTA_STEM}.safetensors").stat().st_size
            return ExtractedDelta(Path(out), kept, entries, nbytes, model_bytes)
        work.prepare()

        def files(digests: Mapping[str, str]) -> dict[str, bytes]:
            facts = {"mergelab": __version__, "identity": identity_digest(identity), "tensors": dict(digests)}
            return {DELTA_CONFIG: _text(config), MARKER: _text(facts)}

        whole = 1 + sum(job.bytes_out for job in jobs)
        write_model(work, jobs, {}, identity, files, shard_bytes=whole, stem=DELTA_STEM, progress=progress)
        nbytes = (work.out / f"{DELTA_STEM}.safetensors").stat().st_size
    return ExtractedDelta(Path(out), kept, entries, nbytes, model_bytes)


@dataclass(eq=False)
class _Change:
    """A tensor's sparse change: found when a part of it is first read, forgotten when both have been."""

    tuned: TensorSource
    base: TensorSource
    count: int
    dtype: np.dtype[Any]
    alone: threading.Lock
    held: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, part: str) -> np.ndarray:
        with self.alone:
            if part not in self.held:
                delta = read_whole(self.tuned).astype(np.float32) - read_whole(self.base).astype(np.float32)
                if odd := int(np.count_nonzero(~np.isfinite(delta))):
                    raise NonFiniteError(
                        f"tensor {self.base.name!r}: {odd} of {delta.size} differences are NaN or infinite; "
                        "repair the model"
                    )
                self.held |= pack_delta(delta, _largest(delta, self.count), self.dtype)
            return self.held[part]

    def forget(self, part: str) -> None:
        with self.alone:
            self.held.pop(part, None)


def _largest(delta: np.ndarray, count: int) -> np.ndarray:
    """Bool: the `count` entries of largest magnitude; ties go to the lowest index."""
    keys = delta.reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)
    threshold, cutoff = select_on_host(keys, count)
    last = (int(cutoff[0]) << 32) | int(cutoff[1])
    kept = keys > threshold
    equal = np.flatnonzero(keys == threshold)
    kept[equal[equal < last]] = True
    return kept if count < keys.size else np.ones(keys.size, bool)


@dataclass(frozen=True)
class _ChangePart:
    """A `TensorSource` of a change's mask or values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    change: _Change
    part: str

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`."""
        out[:] = self.change.take(self.part)[start : start + out.size]
        if start + out.size == self.shape[0]:
            self.change.forget(self.part)


def _paired(tuned: FolderCheckpoint, base: FolderCheckpoint) -> dict[str, tuple[TensorSource, TensorSource]]:
    """The tensors of both models by name; headers only."""
    for name in tuned.tensors.keys() ^ base.tensors.keys():
        lacking, other = (base, tuned) if name in tuned.tensors else (tuned, base)
        raise CheckpointError(
            f"{lacking.path} lacks the tensor {name!r}{did_you_mean(name, lacking.tensors)}, which "
            f"{other.path} has; name a model and the base it was tuned from"
        )
    pairs = {name: (tuned.tensors[name], old) for name, old in base.tensors.items()}
    for name, (new, old) in pairs.items():
        if new.shape != old.shape:
            raise CheckpointError(
                f"{tuned.path}: tensor {name!r} has shape {list(new.shape)} but {list(old.shape)} in "
                f"{base.path}; a task vector cannot change a shape"
            )
    return pairs


def _differs(tuned: TensorSource, base: TensorSource) -> bool:
    """Whether two tensors differ; reads them up to the first difference."""
    size = math.prod(base.shape)
    for start in range(0, size, _PIECE):
        new, old = (np.empty(min(_PIECE, size - start), source.dtype) for source in (tuned, base))
        tuned.read_into(start, new)
        base.read_into(start, old)
        if np.array_equal(new.astype(np.float32), old.astype(np.float32)):
            continue
        if not (is_float(tuned.dtype) and is_float(base.dtype)):
            raise CheckpointError(
                f"tensor {base.name!r} is {base.dtype} and differs between the models; a task vector is of "
                "floating-point weights only: dequantize the model first"
            )
        return True
    return False


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
