"""All that stands between two steps, and how it lies on a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.errors import MeshError
from mergelab.sae.variants.variant import Params
from mergelab.sharding import SAE_AXES, check_axes, put

__all__ = [
    "REPLICATED",
    "Affine",
    "TrainState",
    "batch_fault",
    "batch_part",
    "latents_fault",
    "mesh_axes",
    "place_batch",
    "place_state",
    "state_shardings",
    "state_specs",
]

REPLICATED = frozenset({"decoder_bias", "skip"})
"""Parameters that every shard of latents holds whole; the others are split by their first axis."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """A normalization of activations, `(x - mean) * scale`, the same for every token.

    Attributes:
        mean: `[d]`.
        scale: scalar.
    """

    mean: Array
    scale: Array

    def __call__(self, x: Array) -> Array:
        return (x - self.mean[None, :]) * self.scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of one training.

    Attributes:
        params: the parameters, float32.
        mean: Adam's running mean of the gradients, like `params`.
        square: Adam's running mean of their squares, like `params`.
        average: sum of the moving average of the parameters, not yet divided by the sum of its weights; empty
            where the recipe keeps none.
        steps_since_fired: `[n]`, int32: steps since each latent last fired.
        step: int32, number of steps done.
        peak: float32, peak learning rate.
        mse_scale: float32, one over the variance of the targets, computed once.
        read: normalization of the inputs.
        target: normalization of the targets.
        statistics: running numbers of the variant.
        sweep_member: what a sweep varies within one program: `k` and `n_latents`, int32; may be empty.
    """

    params: Params
    mean: Params
    square: Params
    average: Params
    steps_since_fired: Array
    step: Array
    peak: Array
    mse_scale: Array
    read: Affine
    target: Affine
    statistics: dict[str, Array]
    sweep_member: dict[str, Array]


def mesh_axes(mesh: Mesh) -> tuple[str | None, str | None]:
    """The names of the axes that split tokens and latents; None where the mesh has no such axis.

    Raises:
        MeshError: the mesh has another axis.
    """
    check_axes(mesh.axis_names, SAE_AXES)
    return tuple(name if name in mesh.axis_names else None for name in SAE_AXES)  # pyright: ignore


def state_specs(state: TrainState, latents: str | None = "latents") -> TrainState:
    """How a state lies on a mesh: a tree of specs like it, rows of latents split, the rest whole.

    A sweep's states, stacked along a leading axis, are whole along it: every device has its part of each.
    """
    stacked = (None,) * state.step.ndim

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        group = path[0].name
        split = group in ("params", "mean", "square", "average") and path[1].key not in REPLICATED
        return PartitionSpec(*stacked, latents) if split or group == "steps_since_fired" else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """How a state, or the shapes of one, lies on a mesh: a tree of shardings like it.

    Raises:
        MeshError: the latents do not divide by the axis that splits them, or the mesh has another axis.
    """
    _, latents = mesh_axes(mesh)
    n = state.steps_since_fired.shape[-1]
    if latents and n % mesh.shape[latents]:
        raise MeshError(latents_fault(n, mesh.shape[latents]))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, latents))


def latents_fault(latents: int, devices: int) -> str:
    """Why latents cannot be split over so many devices."""
    return f"{latents} latents cannot be split over {devices} devices; choose a number that divides."


def batch_fault(tokens: int, devices: int) -> str:
    """Why a batch cannot be split over so many devices."""
    return f"train.batch_size is {tokens}, which {devices} devices cannot share; change one."


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Puts a state, the same in every process, on a mesh, its latents split over the axis `latents`.

    Raises:
        MeshError: the latents do not divide by that axis.
    """
    return jax.tree.map(put, state, state_shardings(state, mesh))


def batch_part(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of every batch this process reads, of how many: those of its devices' shards of data.

    Processes that hold other latents of the same tokens read the same part.

    Raises:
        MeshError: this process's devices hold shards of data that are not neighbors, or there are several
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
