"""How the rows of a batch lie on the mesh that a model's parameters lie on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from mergelab.sharding import DEFAULT_RULES, put, rule_axes

__all__ = ["Spread", "constrained", "on_host", "spread_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Rows of a batch on a mesh: each device computes its part of them.

    Attributes:
        mesh: devices of the parameters.
        axes: axes of the mesh that split rows; none where every device computes all of them.
        rows: number of rows that were asked for.
        padded: number of rows that are computed, a multiple of the number of parts; those beyond `rows`
            repeat the last one, have ended before they begin, and are in no result.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    rows: int
    padded: int

    @property
    def sharding(self) -> NamedSharding:
        """Where rows lie, of arrays whose first axis they are."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes or None))

    def place(self, rows: np.ndarray) -> Array:
        """Puts one value for each row asked for on the mesh, with padding; the same in every process."""
        return put(rows[self._sources()], self.sharding)

    def place_keys(self, keys: Key[Array, " batch"]) -> Key[Array, " batch"]:
        """Puts one key for each row asked for on the mesh, with padding."""
        data = self.place(np.asarray(jax.random.key_data(keys)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))

    def is_padding(self) -> Array:
        """Which rows are padding, bool `[padded]`, on the mesh."""
        return put(np.arange(self.padded) >= self.rows, self.sharding)

    def repeat(self, tree: T, times: int) -> tuple[T, Spread]:
        """Every row asked for `times` times, one copy after the other, and how these lie on the mesh."""
        wider = _spread(self.mesh, self.axes, self.rows * times, pad=True)
        chosen = wider._sources() // times
        return _taken(tree, chosen.astype(np.int32), sharding=wider.sharding), wider

    def without_padding(self, tree: T) -> T:
        """The rows that were asked for, on every device, so that every process can read them."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(partial(_first_rows, rows=self.rows), out_shardings=whole)(tree)

    def _sources(self) -> np.ndarray:
        return np.minimum(np.arange(self.padded), self.rows - 1)


def spread_of(params: Any, rows: int, *, pad: bool) -> Spread | None:
    """How a batch is split over the devices of the parameters: over the axes of the rule for `batch`.

    Rows are split over `fsdp` too where each device gets one: for fewer, exchanging what they compute costs
    less than collecting the weights that the axis splits.

    Args:
        params: a model's parameters.
        rows: number of rows.
        pad: whether rows may be added; else those that do not divide are computed by every device.

    Returns:
        None where the parameters lie on one device, or are traced.
    """
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if _on_mesh(leaf)]
    if not meshes:
        return None
    axes = tuple(axis for axis in rule_axes({"batch": DEFAULT_RULES["batch"]}) if axis in meshes[0].shape)
    while axes and not _fits(math.prod(meshes[0].shape[axis] for axis in axes), axes, rows, pad=pad):
        axes = axes[:-1]
    return _spread(meshes[0], axes, rows, pad=pad)


def _fits(parts: int, axes: tuple[str, ...], rows: int, *, pad: bool) -> bool:
    return (rows >= parts or axes == ("data",)) if pad else rows % parts == 0


def _spread(mesh: Mesh, axes: tuple[str, ...], rows: int, *, pad: bool) -> Spread:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    return Spread(mesh, axes, rows, -(-rows // parts) * parts if pad else rows)


def _on_mesh(leaf: Any) -> bool:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return False
    return isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1


def constrained(tree: T, sharding: NamedSharding | None) -> T:
    """Rows where they belong, within a program; how other axes are split is left to the compiler."""
    return tree if sharding is None else jax.tree.map(partial(_constrained, sharding=sharding), tree)


def _constrained(leaf: Array, sharding: NamedSharding) -> Array:
    if not leaf.ndim:
        return leaf
    rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
    spec = PartitionSpec(*(sharding.spec or (None,)), *rest)
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))


@partial(jax.jit, static_argnames="sharding")
def _taken(tree: Any, chosen: Array, *, sharding: NamedSharding) -> Any:
    return constrained(jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim else leaf, tree), sharding)


def _first_rows(tree: Any, *, rows: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:rows] if leaf.ndim else leaf, tree)


def on_host(array: Array) -> np.ndarray:
    """The values of an array, also where other processes hold parts of it; then all of them must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
