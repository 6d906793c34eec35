"""Sparse task vectors: the entries of a model that differ most from its base, added to the base when read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.lora_tensor import ChangedWeight
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.errors import CheckpointError, did_you_mean

__all__ = [
    "DELTA_CONFIG",
    "DELTA_STEM",
    "DeltaCheckpoint",
    "SparseDelta",
    "is_delta",
    "pack_delta",
    "with_delta",
]

DELTA_CONFIG = "delta_config.json"
DELTA_STEM = "delta"
_MASK, _VALUES = ".mask", ".values"
_CHUNK = 1 << 16
"""Entries whose number of changes is remembered together, a multiple of 8."""
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def pack_delta(delta: np.ndarray, kept: np.ndarray, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    """The stored form of the `kept` entries of a change: one bit per entry, and their values in order."""
    mask = np.packbits(kept.reshape(-1), bitorder="little")
    return {_MASK: mask, _VALUES: delta.reshape(-1)[kept.reshape(-1)].astype(dtype)}


def is_delta(path: Path) -> bool:
    """Whether a folder holds a sparse task vector, by its configuration."""
    return (path / DELTA_CONFIG).is_file()


@dataclass(frozen=True)
class SparseDelta(ChangedWeight):
    """A `TensorSource` equal to `weight` plus a sparse change, rounded once to the weight's dtype.

    Attributes:
        weight: the base's tensor.
        mask: uint8 `[ceil(size / 8)]`, a bit per entry, the lowest first.
        values: the changes of the entries whose bit is set, in order.
    """

    mask: TensorSource
    values: TensorSource
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _before: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)

    def _counts(self) -> np.ndarray:
        """How many entries change before each chunk; the mask is read once for it."""
        with self._lock:
            if not self._before:
                bits = np.empty(self.mask.shape[0], np.uint8)
                self.mask.read_into(0, bits)
                size = int(np.prod(self.shape, dtype=np.int64))
                starts = np.arange(0, bits.size, _CHUNK // 8)
                sums = np.add.reduceat(_ONES[bits], starts, dtype=np.int64) if bits.size else starts
                before = np.concatenate([[0], np.cumsum(sums)])
                beyond = size % 8 and bits.size and int(bits[-1]) >> (size % 8)
                if int(before[-1]) != self.values.shape[0] or beyond:
                    raise CheckpointError(
                        f"{self.values.name!r} holds {self.values.shape[0]} values where {self.mask.name!r} "
                        f"marks {int(before[-1])} of {size} entries; the file is damaged, extract it again"
                    )
                self._before.append(before)
            return self._before[0]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the base or the delta cannot be read, or mask and values do not fit.
            ValueError: `out` is not such a buffer, or the range leaves the tensor.
        """
        check_piece(self, int(np.prod(self.shape, dtype=np.int64)), start, out)
        if not out.size:
            return
        self.weight.read_into(start, out)
        before, first = self._counts(), start // _CHUNK * _CHUNK
        stop = start + out.size
        packed = np.empty(-(-(stop - first) // 8), np.uint8)
        self.mask.read_into(first // 8, packed)
        bits = np.unpackbits(packed, count=stop - first, bitorder="little").view(np.bool_)
        skipped = int(np.count_nonzero(bits[: start - first]))
        where = np.flatnonzero(bits[start - first :])
        values = np.empty(where.size, self.values.dtype)
        self.values.read_into(int(before[first // _CHUNK]) + skipped, values)
        wide = np.float64 if self.dtype == np.float64 else np.float32
        out[where] = (out[where].astype(wide) + values.astype(wide)).astype(self.dtype)


@dataclass(frozen=True)
class DeltaCheckpoint:
    """A base checkpoint with a sparse task vector added as its tensors are read; its files are the base's.

    Attributes:
        base: the model it was extracted against.
        delta: the stored masks and values.
        tensors: those of the sum.
    """

    base: Checkpoint
    delta: FolderCheckpoint
    tensors: Mapping[str, TensorSource]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config


def with_delta(checkpoint: Checkpoint, folder: Path | str) -> DeltaCheckpoint:
    """Returns `checkpoint` with a sparse task vector added to it, computed piece by piece when read.

    Raises:
        CheckpointError: the folder is no delta, or names tensors that the model lacks, or has otherwise.
    """
    place = local_path(folder)
    shapes = read_json_object(place / DELTA_CONFIG).get("shapes")
    stored = open_checkpoint(place / f"{DELTA_STEM}.safetensors")
    if not isinstance(shapes, dict):
        raise CheckpointError(f"{place / DELTA_CONFIG}: 'shapes' is missing; extract the delta again")
    tensors = dict(checkpoint.tensors)
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{place}: the delta changes {name!r}, which {checkpoint.path} lacks"
                f"{did_you_mean(name, tensors)}; use the base it was extracted against"
            )
        if list(found.shape) != shape:
            raise CheckpointError(
                f"{place}: the delta's {name!r} is {shape}, but {list(found.shape)} in {checkpoint.path}; "
                "use the base it was extracted against"
            )
        parts = [stored.tensors.get(f"{name}{part}") for part in (_MASK, _VALUES)]
        mask, values = parts
        size = int(np.prod(found.shape, dtype=np.int64))
        if mask is None or values is None or mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
            raise CheckpointError(f"{place}: {name!r} has no whole mask and values; extract the delta again")
        tensors[name] = SparseDelta(found, mask, values)
    return DeltaCheckpoint(checkpoint, stored, tensors)
