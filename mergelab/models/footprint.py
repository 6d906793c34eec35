"""What a model takes of each device of a mesh, computed from its table alone: no weights, no devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from mergelab.errors import MeshError
from mergelab.models.declaration import Leaf
from mergelab.models.model import Model
from mergelab.sharding import DEFAULT_RULES, Rules, named_sharding

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device of a mesh; all devices hold equally much.

    Attributes:
        mesh: its axes and their sizes.
        parameters: bytes of parameters on one device.
        whole: of these, bytes of parameters that every device holds in full.
        total: bytes of the parameters stored once.
        cache: bytes of the key-value cache on one device; 0 where none was asked for.
    """

    mesh: Mapping[str, int]
    parameters: int
    whole: int
    total: int
    cache: int


def footprint(
    model: Model,
    mesh: Mapping[str, int],
    dtype_of: Callable[[Leaf], np.dtype[Any]],
    *,
    rules: Rules = DEFAULT_RULES,
    batch: int = 1,
    cache_length: int = 0,
) -> Footprint:
    """How much memory `load_model(path, mesh=...)` takes on each device.

    Args:
        model: the model.
        mesh: the sizes of the mesh's axes, such as `{"data": 1, "tensor": 8}`.
        dtype_of: the dtype a leaf is loaded as.
        rules: logical axis -> mesh axes.
        batch: sequences in the cache.
        cache_length: slots of each sequence in the cache; 0 for no cache.

    Raises:
        MeshError: a size is not positive, or a rule is missing.
    """
    if not mesh or min(mesh.values()) < 1:
        raise MeshError(f"a mesh of {dict(mesh)} has no devices; give every axis a positive size.")
    # Only the sizes of its axes are asked for: a mesh without devices is one, whatever the annotation says.
    devices: Any = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    parameters = whole = total = 0
    for leaf in model.table():
        width = dtype_of(leaf).itemsize
        mine = (
            math.prod(named_sharding(devices, leaf.shape, leaf.axes, rules).shard_shape(leaf.shape)) * width
        )
        parameters += mine
        total += leaf.size * width
        whole += mine if mine == leaf.size * width else 0
    cache = 0
    if cache_length:
        c = model.config
        shape = (batch, cache_length, c.kv_heads, c.head_dim)
        sharding = named_sharding(devices, shape, ("batch", "length", "kv_heads", None), rules)
        width = max(dtype_of(leaf).itemsize for leaf in model.table())
        cache = 2 * c.layers * math.prod(sharding.shard_shape(shape)) * width
    return Footprint(dict(mesh), parameters, whole, total, cache)
