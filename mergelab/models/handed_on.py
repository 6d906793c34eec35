"""Leaves that would be read in short runs: each process reads rows of them, and devices hand them on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.models.layout import Box, box_shape, box_size, join, normalize, whole, widen
from mergelab.models.table import Leaf

__all__ = ["RowShares", "row_shares"]

_WASTE = 1.25
"""Bytes read for each byte that is kept, from which on rows are read and handed on."""


@dataclass(frozen=True)
class RowShares:
    """Rows of a leaf, as they stand in its files, in as many equal shares as the mesh has devices.

    Attributes:
        shape: the leaf's shape.
        axis: the axis of the leaf that the rows of its files are.
        sharding: how the leaf is to lie in the end.
    """

    shape: tuple[int, ...]
    axis: int
    sharding: NamedSharding

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return _mesh_of(self.sharding)

    @property
    def boxes(self) -> dict[Any, Box]:
        """The slice of the leaf that each device of this process is to have read; some may be empty."""
        here, found = jax.process_index(), {}
        for number, device in enumerate(self.mesh.devices.flat):
            if device.process_index == here:
                low, high = (min(place * self._rows, self.shape[self.axis]) for place in (number, number + 1))
                box = whole(self.shape)
                found[device] = (*box[: self.axis], (low, high), *box[self.axis + 1 :])
        return found

    @property
    def _rows(self) -> int:
        return -(-self.shape[self.axis] // self.mesh.size)

    def hand_on(self, read: Mapping[Box, np.ndarray] | None, dtype: np.dtype[Any]) -> jax.Array:
        """The leaf from what each process has read; every process must call it at the same point.

        Args:
            read: the arrays of `boxes`; None where reading failed, so that the others are not kept waiting.
            dtype: the leaf's.
        """
        mesh = self.mesh
        full = list(self.shape)
        full[self.axis] = self._rows
        parts = []
        for device, box in self.boxes.items():
            part = None if read is None or not box_size(box) else read[box]
            if part is None or part.shape != tuple(full):
                filled = np.zeros(full, dtype)
                if part is not None:
                    filled[tuple(slice(0, size) for size in box_shape(box))] = part
                part = filled
            parts.append(jax.device_put(part, device))
        full[self.axis] = self._rows * mesh.size
        rows = NamedSharding(mesh, PartitionSpec(*[None] * self.axis, mesh.axis_names))
        laid = jax.make_array_from_single_device_arrays(tuple(full), rows, parts, dtype=dtype)
        return _handing(self.axis, self.shape[self.axis], self.sharding)(laid)


@lru_cache(maxsize=256)
def _handing(axis: int, size: int, sharding: NamedSharding) -> Any:
    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)

    return jax.jit(cut, out_shardings=sharding)


def _mesh_of(sharding: NamedSharding) -> Mesh:
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh), "a sharding without devices"
    return mesh


def row_shares(leaf: Leaf, sharding: NamedSharding, itemsize: int) -> RowShares | None:
    """How a leaf is read by rows where its shards lie in short runs; None where each reads its own shards.

    Every process of the mesh gets the same answer.

    Args:
        leaf: the leaf.
        sharding: how it is to lie, on devices of several processes.
        itemsize: bytes of an element in the files.
    """
    if not leaf.layout.storage_order or not math.prod(leaf.shape):
        return None
    # All shards are of one shape: what the first process reads stands for all.
    mesh = _mesh_of(sharding)
    first = mesh.devices.flat[0].process_index
    indices = sharding.devices_indices_map(leaf.shape)
    boxes = {normalize(i, leaf.shape) for device, i in indices.items() if device.process_index == first}
    axis = leaf.layout.storage_order[0] + int(leaf.stack > 0)
    kept = sum(map(box_size, boxes))
    if leaf.shape[axis] < mesh.size or _read_size(leaf, boxes, itemsize) <= _WASTE * kept:
        return None
    return RowShares(leaf.shape, axis, sharding)


def _read_size(leaf: Leaf, boxes: set[Box], itemsize: int) -> int:
    """Elements that are read of files to fill boxes of a leaf: runs near each other come in one piece."""
    sources: dict[str, list[Box]] = {}
    for box in boxes:
        for name, source, _ in leaf.pullback(box):
            sources.setdefault(name, []).append(source)
    view = leaf.layout.view
    return sum(
        box_size(widen(view, region, itemsize)) for found in sources.values() for region in join(found)
    )
