"""Reads and writes the parameters of any family as an HF checkpoint, following the family's table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.shard_plan import TensorSpec, plan_shards
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.writer import CheckpointWriter
from mergelab.errors import CheckpointError, did_you_mean
from mergelab.models.declaration import Leaf, get_leaf, tree_from_leaves

__all__ = ["load_params", "save_params"]

SHARD_BYTES = 5_000_000_000


def load_params(
    tensors: Mapping[str, TensorSource], leaves: Sequence[Leaf], place: str, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads every leaf's tensor as float32.

    Args:
        tensors: the tensors of an open checkpoint.
        leaves: the family's table for its configuration.
        place: the checkpoint's path, for messages.
        ignore: HF names that may be there and are not read (copies of tied weights).

    Raises:
        CheckpointError: a tensor is missing, left over, not of a float type, or of another shape.
    """
    names = {leaf.hf_name for leaf in leaves}
    for name in tensors:
        if name not in names and name not in ignore:
            raise CheckpointError(
                f"{place} has the tensor {name!r}, which config.json leaves no use for"
                f"{did_you_mean(name, names)}; correct config.json, or remove the tensor."
            )
    return tree_from_leaves({leaf: jnp.asarray(_read(tensors, leaf, place)) for leaf in leaves})


def save_params(
    params: Mapping[str, Any],
    leaves: Sequence[Leaf],
    config: Mapping[str, Any],
    path: Path,
    files: Mapping[str, bytes],
) -> None:
    """Writes an HF folder: `config.json`, `generation_config.json`, float32 weights, and `files` (tokenizer).

    Raises:
        OutputError: the folder exists and is not empty, or the disk is full.
    """
    specs = [TensorSpec(leaf.hf_name, np.dtype(np.float32), leaf.hf_shape) for leaf in leaves]
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    texts = {"config.json": _json(config), "generation_config.json": _json(ids)}
    identity = hashlib.sha256(texts["config.json"]).hexdigest()
    with CheckpointWriter(path, plan_shards(specs, SHARD_BYTES), identity) as writer:
        for leaf in leaves:
            array = np.empty(leaf.hf_shape, np.float32)
            leaf.inverse(np.asarray(get_leaf(params, leaf), np.float32), [array])
            writer.write(leaf.hf_name, 0, array.reshape(-1))
        for name, content in {**texts, **files}.items():
            writer.add_file(name, content)
        writer.commit()


def _read(tensors: Mapping[str, TensorSource], leaf: Leaf, place: str) -> np.ndarray:
    source = tensors.get(leaf.hf_name)
    if source is None:
        raise CheckpointError(
            f"{place} lacks the tensor {leaf.hf_name!r}{did_you_mean(leaf.hf_name, tensors)}, which its "
            "config.json calls for; the download may be incomplete."
        )
    if source.shape != leaf.hf_shape or not is_float(source.dtype):
        raise CheckpointError(
            f"{place}: tensor {leaf.hf_name!r} is {source.dtype} {list(source.shape)}, but config.json asks "
            f"for floating-point {list(leaf.hf_shape)}; use the config.json that belongs to the weights."
        )
    flat = np.empty(int(np.prod(source.shape, dtype=np.int64)), source.dtype)
    source.read_into(0, flat)
    return np.ascontiguousarray(leaf.forward([flat.reshape(source.shape).astype(np.float32)]))


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
