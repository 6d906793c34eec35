"""How a training lies on a mesh: latents split over one axis, tokens of a batch over another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.errors import MeshError
from mergelab.sae.state import TrainState
from mergelab.sae.update import REPLICATED

__all__ = ["mesh_axes", "place_batch", "place_state", "state_shardings", "state_specs"]


def mesh_axes(mesh: Mesh) -> tuple[str | None, str | None]:
    """The names of the axes that split tokens and latents; None where the mesh has no such axis.

    Raises:
        MeshError: the mesh has another axis.
    """
    unknown = set(mesh.axis_names) - {"data", "latents"}
    if unknown:
        raise MeshError(
            f"the mesh has an axis {sorted(unknown)[0]!r}; an SAE is trained over 'data' and 'latents'."
        )
    return tuple(name if name in mesh.axis_names else None for name in ("data", "latents"))  # pyright: ignore


def state_specs(state: TrainState, latents: str | None = "latents") -> TrainState:
    """How a state lies on a mesh: a tree of specs like it, rows of latents split, the rest whole."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        group = path[0].name
        if group == "quiet":
            return PartitionSpec(latents)
        if group in ("params", "mean", "square", "average") and path[1].key not in REPLICATED:
            return PartitionSpec(latents, *(None,) * (leaf.ndim - 1))
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """How a state, or the shapes of one, lies on a mesh: a tree of shardings like it.

    Raises:
        MeshError: the latents do not divide by the axis that splits them, or the mesh has another axis.
    """
    _, latents = mesh_axes(mesh)
    n = state.quiet.shape[0]
    if latents and n % mesh.shape[latents]:
        raise MeshError(
            f"{n} latents cannot be split over {mesh.shape[latents]} devices; choose a number that divides."
        )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, latents))


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Puts a state, the same in every process, on a mesh, its latents split over the axis `latents`.

    Raises:
        MeshError: the latents do not divide by that axis.
    """

    def put(leaf: Array, sharding: NamedSharding) -> Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, state, state_shardings(state, mesh))


def place_batch(batch: np.ndarray, mesh: Mesh) -> Array:
    """Puts this process's rows of a batch on the mesh, split over the axis `data`.

    Args:
        batch: `[tokens of this process, d]`: all of the batch where one process holds all shards of data.
        mesh: the mesh.
    """
    data, _ = mesh_axes(mesh)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(data, None)), batch)
