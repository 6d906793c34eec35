"""How a training lies on a mesh: latents split over one axis, tokens of a batch over another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.errors import MeshError
from mergelab.sae.dictionary import LATENT_AXIS, Dictionary
from mergelab.sae.state import TrainState
from mergelab.sae.update import REPLICATED

__all__ = [
    "batch_part",
    "dictionary_shardings",
    "mesh_axes",
    "place_batch",
    "place_dictionary",
    "place_state",
    "state_shardings",
    "state_specs",
]


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
    """How a state lies on a mesh: a tree of specs like it, rows of latents split, the rest whole.

    A sweep's states, stacked along a leading axis, are whole along it: every device has its part of each.
    """
    stacked = (None,) * state.step.ndim

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        group = path[0].name
        split = group in ("params", "mean", "square", "average") and path[1].key not in REPLICATED
        return PartitionSpec(*stacked, latents) if split or group == "quiet" else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """How a state, or the shapes of one, lies on a mesh: a tree of shardings like it.

    Raises:
        MeshError: the latents do not divide by the axis that splits them, or the mesh has another axis.
    """
    _, latents = mesh_axes(mesh)
    n = state.quiet.shape[-1]
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
    return jax.tree.map(_put, state, state_shardings(state, mesh))


def place_dictionary(dictionary: Dictionary, mesh: Mesh) -> Dictionary:
    """Puts a dictionary, the same in every process, on a mesh, its latents split over the axis `latents`."""
    return jax.tree.map(_put, dictionary, dictionary_shardings(dictionary, mesh))


def _put(leaf: Array, sharding: NamedSharding) -> Array:
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def dictionary_shardings(dictionary: Dictionary, mesh: Mesh) -> Dictionary:
    """How a dictionary, or the shapes of one, lies on a mesh: a tree of shardings like it.

    Its latents are split over the axis `latents`, if the mesh has one that divides their number.
    """
    latents = "latents" if dictionary.n_latents % mesh.shape.get("latents", 1) == 0 else None
    latents = latents if "latents" in mesh.axis_names else None

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axis = LATENT_AXIS.get(path[0].name)
        return NamedSharding(mesh, PartitionSpec(*(latents if i == axis else None for i in range(leaf.ndim))))

    return jax.tree_util.tree_map_with_path(sharding, dictionary)


def batch_part(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of every batch this process reads, of how many: those of its devices' shards of data.

    Processes that hold other latents of the same tokens read the same part.

    Raises:
        MeshError: this process's devices hold shards of data that are not neighbours, or there are several
            processes and no mesh.
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise MeshError(
                f"{jax.process_count()} processes train together: say how, with a mesh such as "
                f"{{data: {jax.device_count()}}}."
            )
        return 0, 1
    data, _ = mesh_axes(mesh)
    size = mesh.shape[data] if data else 1
    held = NamedSharding(mesh, PartitionSpec(data)).addressable_devices_indices_map((size,)).values()
    places = sorted({range(size)[index[0]][0] for index in held if index is not None})
    first, count = places[0], len(places)
    if places != list(range(first, first + count)) or size % count or first % count:
        raise MeshError(
            f"the devices of one process hold parts {places} of {size} of a batch, which are not one piece; "
            "choose another size for the mesh's axis 'data'."
        )
    return first // count, size // count


def place_batch(batch: np.ndarray, mesh: Mesh) -> Array:
    """Puts this process's rows of a batch on the mesh, split over the axis `data`.

    Args:
        batch: `[tokens of this process, d]`: the part of the batch that `batch_part` names.
        mesh: the mesh.
    """
    data, _ = mesh_axes(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(data, None))
    rows = batch.shape[0] * batch_part(mesh)[1]
    return jax.make_array_from_process_local_data(sharding, batch, (rows, batch.shape[1]))
