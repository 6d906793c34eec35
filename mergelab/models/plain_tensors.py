"""Checkpoints rewritten tensor by tensor, of whatever model: for families whose forward pass is not here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.models.load import check_dtype
from mergelab.models.save import SHARD_BYTES, save_params
from mergelab.models.table import Leaf

__all__ = ["rewrite_tensors"]


def rewrite_tensors(
    checkpoint: Checkpoint,
    path: str | Path | WorkFolder,
    *,
    dtype: Any = None,
    files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    identity: str = "",
) -> int:
    """Writes every tensor under its own name, and `config.json` with the new dtype.

    Args:
        checkpoint: open checkpoint.
        path: folder to write, or the work folder of one.
        dtype: dtype of all floating-point tensors; the stored ones if None. Integers stay as they are.
        files: further files by name.
        shard_bytes: weights go into several files if they are larger.
        identity: SHA-256 of all that decides the content, where the caller can tell.

    Returns:
        Bytes of the tensors.

    Raises:
        CheckpointError: a tensor cannot be read, or `dtype` is not a float type.
        OutputError: the folder is not empty, or the disk is full.
    """
    wanted = None if dtype is None else check_dtype(dtype)
    arrays = {name: _read(source, wanted) for name, source in checkpoint.tensors.items()}
    table = [Leaf((name,), name, array.shape) for name, array in arrays.items()]
    sizes: Counter[str] = Counter()
    for array in arrays.values():
        if is_float(array.dtype):
            sizes[str(array.dtype)] += array.nbytes
    config = dict(checkpoint.config)
    if config and sizes:
        config["dtype" if "dtype" in config else "torch_dtype"] = sizes.most_common(1)[0][0]
    written = {"config.json": (json.dumps(config, indent=2) + "\n").encode()} if config else {}
    files = {**(files or {}), **written}
    save_params(arrays, table, path, files=files, shard_bytes=shard_bytes, identity=identity)
    return sum(array.nbytes for array in arrays.values())


def _read(source: TensorSource, dtype: np.dtype[Any] | None) -> np.ndarray:
    flat = np.empty(int(np.prod(source.shape, dtype=np.int64)), source.dtype)
    source.read_into(0, flat)
    array = flat.reshape(source.shape)
    return array.astype(dtype) if dtype is not None and is_float(source.dtype) else array
