"""All that stands between two steps, and how it lies on a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.compat import register_dataclass
from mergelab.errors import MeshError
from mergelab.processes.agreement import span_processes
from mergelab.sae.variants.variant import SAEParams
from mergelab.sharding import SAE_AXES, check_axes, put

__all__ = [
    "REPLICATED",
    "Affine",
    "TrainState",
    "batch_fault",
    "batch_part",
    "handed_on",
    "latents_fault",
    "mesh_axes",
    "place_batch",
    "place_state",
    "state_shardings",
    "state_specs",
    "whole_batch",
]

REPLICATED = frozenset({"decoder_bias", "skip"})
"""Parameters that every shard of latents holds whole; the others are split by their first axis."""


@register_dataclass
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


@register_dataclass
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

    params: SAEParams
    mean: SAEParams
    square: SAEParams
    average: SAEParams
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


def batch_part(mesh: Mesh | None, batch_size: int) -> np.ndarray:
    """Which rows of every batch this process reads: int64, ascending, a piece for each of its devices.

    Each row is read by one process. Where devices of several processes hold other latents of the same rows,
    each device is given an equal share of them, and the step hands the shares on (`whole_batch`).

    Args:
        mesh: axes `data` and `latents`; None is one device.
        batch_size: rows of a batch, a multiple of the axis `data`.

    Raises:
        MeshError: the mesh has no device of this process, or there are several processes and no mesh.
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise MeshError(
                f"{jax.process_count()} processes train together: say how, with a mesh such as "
                f"{{data: {jax.device_count()}}}."
            )
        return np.arange(batch_size)
    mine = _pieces(mesh, batch_size)
    if not mine:
        raise MeshError(
            f"the mesh {dict(mesh.shape)} has no device of process {jax.process_index()}; lay it over the "
            "devices of all processes."
        )
    return np.unique(np.concatenate([np.arange(*piece) for piece in mine.values()]))


def place_batch(batch: np.ndarray, mesh: Mesh, batch_size: int | None = None) -> Array:
    """Puts this process's rows of a batch on the mesh, split over the axis `data`, or as they are handed on.

    Args:
        batch: `[rows of this process, d]`: those that `batch_part` names.
        mesh: the mesh.
        batch_size: rows of the whole batch; by default it is all here.
    """
    size = len(batch) if batch_size is None else batch_size
    data, latents = mesh_axes(mesh)
    if not span_processes(mesh.devices.flat):
        sharding = NamedSharding(mesh, PartitionSpec(data, None))
        return jax.make_array_from_process_local_data(sharding, batch, (size, batch.shape[1]))
    mine = _pieces(mesh, size)
    part = np.unique(np.concatenate([np.arange(*piece) for piece in mine.values()]))
    handed, parts = handed_on(mesh), _data_size(mesh)
    shares = mesh.size // parts if handed else 1
    rows = -(-(size // parts) // shares)  # the last share of a part is filled up where they do not divide
    arrays = []
    for device, (start, stop) in mine.items():
        first = int(np.searchsorted(part, start))
        piece = batch[first : first + stop - start]
        if len(piece) < rows:
            piece = np.concatenate([piece, np.zeros((rows - len(piece), batch.shape[1]), batch.dtype)])
        arrays.append(jax.device_put(piece, device))
    spec = PartitionSpec(tuple(axis for axis in (data, latents) if axis) if handed else data, None)
    shape = (rows * shares * parts, batch.shape[1])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), arrays)


def whole_batch(x: Array, mesh: Mesh, batch_size: int) -> Array:
    """A batch as `place_batch` laid it, without what fills it up; for use under `jit`, which hands it on."""
    if x.shape[0] == batch_size:
        return x
    parts = _data_size(mesh)
    return x.reshape(parts, -1, x.shape[1])[:, : batch_size // parts].reshape(batch_size, x.shape[1])


def handed_on(mesh: Mesh) -> bool:
    """Whether devices of several processes hold other latents of the same rows."""
    return any(span_processes(row) for row in _by_data(mesh))


def _data_size(mesh: Mesh) -> int:
    return mesh.shape.get("data", 1)


def _by_data(mesh: Mesh) -> np.ndarray:
    """The devices of a mesh, `[data, latents]`."""
    data, latents = mesh_axes(mesh)
    order = [mesh.axis_names.index(axis) for axis in (data, latents) if axis]
    return mesh.devices.transpose(order).reshape(_data_size(mesh), -1)


def _pieces(mesh: Mesh, batch_size: int) -> dict[Any, tuple[int, int]]:
    """The rows of a batch, from and to, that each device of this process is given."""
    devices, here = _by_data(mesh), jax.process_index()
    rows = batch_size // len(devices)
    share = -(-rows // devices.shape[1]) if handed_on(mesh) else 0
    found = {}
    for (part, place), device in np.ndenumerate(devices):
        if device.process_index == here:
            start, stop = (place * share, (place + 1) * share) if share else (0, rows)
            found[device] = (part * rows + min(start, rows), part * rows + min(stop, rows))
    return found
