"""Meshes, and the table of rules that says over which of their axes the parts of a model are split.

A parameter's axes have logical names (`embed`, `heads`, `mlp`, ...); a rule maps each to axes of the mesh. To
shard a model otherwise, pass other rules: `{**DEFAULT_RULES, "embed": None}`.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mergelab.accelerators import idle_accelerator
from mergelab.errors import MeshError, did_you_mean

__all__ = [
    "DEFAULT_RULES",
    "DISPATCH",
    "Rules",
    "describe_devices",
    "make_mesh",
    "named_sharding",
    "partition_spec",
    "put",
]

DISPATCH = threading.RLock()
"""Held while a program that spans devices is started in one of several threads: devices that are given two
programs in different orders wait for each other."""

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": None,
        "vocab": "tensor",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "experts": "tensor",
    }
)
"""Logical axis -> mesh axes, for meshes of `data` (batches), `fsdp` (both), `tensor` (weights)."""


def describe_devices() -> str:
    """The devices that jax found, such as `8 x TPU v5 lite`.

    Warns:
        UserWarning: this machine has an accelerator that the installed jax cannot use; says what cures it.
    """
    if jax.default_backend() == "cpu" and (sentence := idle_accelerator()):
        warnings.warn(sentence, stacklevel=2)
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the devices of all processes, in the order that suits their network.

    Args:
        sizes: number of devices along each axis, such as `{"data": 2, "tensor": 4}`. One may be -1: whatever
            the others leave.
        devices: the devices to use; by default all of them.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = dict(sizes)
    open_axes = [name for name, size in shape.items() if size == -1]
    known = math.prod(size for size in shape.values() if size != -1)
    if len(open_axes) == 1 and known > 0:
        shape[open_axes[0]] = len(devices) // known
    if not shape or min(shape.values()) < 1 or math.prod(shape.values()) != len(devices):
        raise MeshError(
            f"a mesh of {dict(sizes)} cannot be laid over {len(devices)} devices; choose sizes whose product "
            "is their number, or one -1 for what the others leave."
        )
    auto = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=devices)


def partition_spec(axes: Sequence[str | None], rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """The mesh axes that each logical axis is split over; a mesh axis serves the first that asks for it.

    Raises:
        MeshError: there is no rule for a logical axis.
    """
    used: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise MeshError(
                f"the sharding rules have no entry for the logical axis {axis!r}{did_you_mean(axis, rules)}; "
                "add one, with None to keep the axis whole."
            )
        wanted = rules[axis] if axis is not None else None
        names = (wanted,) if isinstance(wanted, str) else wanted or ()
        names = tuple(name for name in names if name not in used)
        used.update(names)
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def named_sharding(
    mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None], rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """How an array lies on a mesh by the rules.

    Rules for mesh axes that this mesh does not have do nothing. An axis whose length its mesh axes do not
    divide (a vocabulary of 50,257 over 8 devices) stays whole: every device holds all of it.

    Args:
        mesh: the mesh.
        shape: the array's shape.
        axes: the logical name of each of its axes; empty if it is never split.
        rules: logical axis -> mesh axes.

    Raises:
        MeshError: there is no rule for a logical axis.
    """
    present = {
        logical: tuple(name for name in ((to,) if isinstance(to, str) else to or ()) if name in mesh.shape)
        for logical, to in rules.items()
    }
    whole = {
        name
        for name, size in zip(axes, shape, strict=False)
        if name in present and size % math.prod(mesh.shape[axis] for axis in present[name])
    }
    kept = [None if name in whole else name for name in axes]
    return NamedSharding(mesh, partition_spec(kept, present))


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array, the same in every process, on a mesh: each device gets its own part."""
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
