"""Activations in `.npy` and `.safetensors` files, `[tokens, d]` each, read by ranges of rows."""

from __future__ import annotations

import bisect
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from mergelab.checkpoints import TensorSource, open_safetensors
from mergelab.checkpoints.npy_files import NpyFile, open_npy
from mergelab.errors import CheckpointError, NonFiniteError

__all__ = ["ActivationFiles", "find_activation_files", "open_activation_files"]

SCALES = "scales"
"""The tensor of a safetensors file that multiplies int8 rows, one number for each."""

TENSOR = "activations"
"""The tensor's name in a safetensors file; a file with a single tensor may call it anything."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    width: int
    dtype: np.dtype
    tensor: TensorSource | NpyFile
    scales: TensorSource | None = None  # of int8 rows

    def read(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.tensor, NpyFile):
            piece = self.tensor.rows(start, stop)
        else:
            piece = np.empty((stop - start, self.width), self.dtype)
            self.tensor.read_into(start * self.width, piece.reshape(-1))
        rows = np.asarray(piece, np.float32)
        if self.scales is not None:
            scales = np.empty(stop - start, np.float32)
            self.scales.read_into(start, scales)
            rows = rows * scales[:, None]
        if not np.isfinite(rows).all():
            row = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise NonFiniteError(
                f"{self.path}: row {row} holds NaN or infinity; remove it or find where it comes from"
            )
        return rows


@dataclass(frozen=True)
class ActivationFiles:
    """Rows of several files, one after the other in the order of their names."""

    shards: tuple[_Shard, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.rows for shard in self.shards))

    @property
    def rows(self) -> int:
        """Rows of all files together."""
        return self._ends[-1]

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.shards[0].width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
            CheckpointError: a file cannot be read.
        """
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            shard, first = self.shards[index], self._ends[index] - self.shards[index].rows
            end = min(stop, self._ends[index])
            pieces.append(shard.read(start - first, end - first))
            start, index = end, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_activation_files(patterns: str | Path | Sequence[str | Path]) -> ActivationFiles:
    """Opens the files that match, reading their headers only.

    Args:
        patterns: a path or glob such as `acts/*.npy`, or several.

    Raises:
        CheckpointError: nothing matches, a file is not `[tokens, d]` floats, or widths differ.
    """
    paths = find_activation_files(patterns)
    shards = tuple(_open(path) for path in paths)
    for shard in shards:
        if shard.width != shards[0].width:
            raise CheckpointError(
                f"{shard.path}: activations are {shard.width} wide, but those of {shards[0].path} "
                f"{shards[0].width}; give files of one site"
            )
    shards = tuple(shard for shard in shards if shard.rows)
    if not shards:
        raise CheckpointError(f"{paths[0]}: the files hold no rows")
    return ActivationFiles(shards)


def find_activation_files(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that match paths or globs, each pattern's in the order of their names.

    Raises:
        CheckpointError: nothing matches one of them.
    """
    paths: list[Path] = []
    for pattern in map(str, [patterns] if isinstance(patterns, str | Path) else patterns):
        found = sorted(glob.glob(pattern)) or ([pattern] if os.path.exists(pattern) else [])
        if not found:
            raise CheckpointError(f"{pattern}: no file matches; expected .npy or .safetensors activations")
        paths += map(Path, found)
    return paths


def _open(path: Path) -> _Shard:
    if path.suffix == ".npy":
        tensor, scales = open_npy(path), None
        shape, dtype = tensor.header.shape, tensor.header.dtype
    elif path.suffix == ".safetensors":
        tensors = dict(open_safetensors(path).tensors)
        scales = tensors.pop(SCALES, None)
        if TENSOR not in tensors and len(tensors) != 1:
            raise CheckpointError(
                f"{path}: holds {len(tensors)} tensors, none of them {TENSOR!r}; name the activations so"
            )
        tensor = tensors[TENSOR] if TENSOR in tensors else next(iter(tensors.values()))
        shape, dtype = tensor.shape, tensor.dtype
    else:
        raise CheckpointError(f"{path}: activations are read from .npy and .safetensors files")
    kinds = ("int8",) if scales is not None else ("float32", "float16", "bfloat16", "float64")
    if len(shape) != 2 or not shape[1] or dtype.name not in kinds:
        raise CheckpointError(
            f"{path}: holds {dtype.name} of shape {list(shape)}; expected floats of shape [tokens, d]"
        )
    if scales is not None and (scales.shape != shape[:1] or scales.dtype != np.float32):
        raise CheckpointError(f"{path}: {SCALES!r} must be float32 of shape [{shape[0]}], one for each row")
    return _Shard(path, shape[0], shape[1], dtype, tensor, scales)
