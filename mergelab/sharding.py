"""Meshes, and the table of rules that says over which of their axes the parts of a model are split.

A parameter's axes have logical names (`embed`, `heads`, `mlp`, ...); a rule maps each to axes of the mesh. To
shard a model otherwise, pass other rules: `{**DEFAULT_RULES, "embed": None}`.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mergelab.accelerators import idle_accelerator
from mergelab.errors import MeshError, did_you_mean, quoted

__all__ = [
    "DEFAULT_RULES",
    "DISPATCH",
    "MODEL_AXES",
    "SAE_AXES",
    "Rules",
    "check_axes",
    "describe_devices",
    "fill_sizes",
    "idle_devices",
    "known_sae_axes",
    "make_mesh",
    "mesh_of",
    "named_sharding",
    "partition_spec",
    "put",
    "read_sizes",
    "rule_axes",
    "shown_sizes",
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


MODEL_AXES = ("data", "fsdp", "tensor")
"""Axes of a model's mesh by `DEFAULT_RULES`."""

SAE_AXES = ("data", "latents")
"""Axes of the mesh that an SAE is trained on."""

_MOST = 2**31 - 1


def shown_sizes(sizes: Mapping[str, int]) -> str:
    """`{"data": 2, "tensor": 4}` as `data=2,tensor=4`."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def read_sizes(text: str) -> dict[str, int]:
    """A mesh as the command line writes it.

    >>> read_sizes("data=2, tensor=-1")
    {'data': 2, 'tensor': -1}

    Raises:
        MeshError: a part is not `axis=size`, or an axis occurs twice; all faults are named.
    """
    sizes: dict[str, int] = {}
    faults: list[str] = []
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        number = size.removeprefix("-")
        if not equals or not name.isidentifier() or not (number.isascii() and number.isdecimal()):
            faults.append(f"{quoted(part)} is not axis=size")
        elif name in sizes:
            faults.append(f"{name} occurs twice")
        elif int(size[:12]) < -1 or int(size[:12]) == 0:
            faults.append(f"{name} has {size} devices")
        else:
            sizes[name] = int(size) if len(size) < 12 else _MOST
    if faults:
        raise MeshError(
            f"{quoted(text)} is not a mesh ({'; '.join(faults)}); write each axis once with its size, "
            "data=2,tensor=8, one of them -1 for the devices that the others leave."
        )
    return sizes


def rule_axes(rules: Rules) -> tuple[str, ...]:
    """The mesh axes that rules split something over, each once."""
    axes = [axis for to in rules.values() for axis in ((to,) if isinstance(to, str) else to or ())]
    return tuple(dict.fromkeys(axes))


def check_axes(names: Iterable[str], axes: Collection[str]) -> None:
    """Refuses axes over which nothing would be split: each of their devices would hold and do the same.

    Args:
        names: axes of a mesh.
        axes: axes that mean something.

    Raises:
        MeshError: some do not; each is named, with the axes that there are.
    """
    if faults := _axis_faults(names, axes):
        raise MeshError(faults)


def known_sae_axes(sizes: Any) -> Any:
    """The sizes as they are, for a validator of a configuration.

    Raises:
        ValueError: an axis means nothing to the training of an SAE.
    """
    if isinstance(sizes, Mapping) and (faults := _axis_faults(list(sizes)[:20], SAE_AXES)):
        raise ValueError("; ".join(fault.removesuffix(".") for fault in faults))
    return sizes


def _axis_faults(names: Iterable[str], axes: Collection[str]) -> list[str]:
    known = [*axes]
    there = f"{', '.join(known[:-1])} and {known[-1]}" if len(known) > 1 else "".join(known)
    return [
        f"the mesh has an axis {quoted(name)}{did_you_mean(str(name), known)}, over which nothing is split; "
        f"the axes here are {there}."
        for name in names
        if name not in known
    ]


def fill_sizes(
    sizes: Mapping[str, int],
    devices: int,
    *,
    axes: Collection[str] | None = None,
    all_of_them: bool = False,
    place: str = "devices",
) -> dict[str, int]:
    """The sizes of a mesh with its one -1 replaced by what the others leave of so many devices.

    >>> fill_sizes({"data": 2, "tensor": -1}, 8)
    {'data': 2, 'tensor': 4}

    Args:
        sizes: number of devices along each axis; one may be -1.
        devices: number of devices there are.
        axes: axes that mean something here; any if None.
        all_of_them: whether a mesh of fewer devices is refused.
        place: what the devices are, for messages.

    Raises:
        MeshError: an unknown axis, a size that is none, or sizes that so many devices cannot have; all
            faults are named.
    """
    shape = {name: size for name, size in sizes.items()}
    faults = [] if axes is None else _axis_faults(shape, axes)
    if not shape:
        faults.append(f"a mesh without axes cannot be laid over {devices} {place}; name one, such as data.")
    wrong = [
        name
        for name, size in shape.items()
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < -1 or size == 0
    ]
    faults += [
        f"the mesh's axis {quoted(name)} is {quoted(shape[name])}, which cannot be laid over {devices} "
        f"{place}; give it a positive number, or -1 for what the others leave."
        for name in wrong
    ]
    left = [name for name, size in shape.items() if name not in wrong and size == -1]
    if len(left) > 1:
        faults.append(
            f"the mesh has -1 for {' and '.join(left)}, which cannot be laid over {devices} {place}; one "
            "axis alone can take what the others leave."
        )
    if wrong or len(left) > 1 or not shape:
        raise MeshError(faults)
    known = math.prod(size for size in shape.values() if size != -1)
    said = f"a mesh of {shown_sizes(sizes)} cannot be laid over {devices} {place}"
    if left and devices % known:
        faults.append(f"{said}: {known} does not divide {devices}; choose sizes whose product does.")
    elif known > devices:
        faults.append(f"{said}: it takes {known:,}; choose smaller sizes, or -1 for one of them.")
    elif all_of_them and not left and known != devices:
        faults.append(f"{said}: it takes {known:,}; choose sizes whose product is {devices}, or one -1.")
    if faults:
        raise MeshError(faults)
    return {name: devices // known if size == -1 else int(size) for name, size in shape.items()}


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[Any] | None = None,
    *,
    axes: Collection[str] | None = None,
) -> Mesh:
    """A mesh of the devices of all processes, in the order that suits their network.

    Args:
        sizes: number of devices along each axis, such as `{"data": 2, "tensor": 4}`. One may be -1: whatever
            the others leave. Where their product is less than the number of devices, the first are taken, of
            several processes equally many of each.
        devices: the devices to use; by default all of them.
        axes: axes that mean something to whoever uses the mesh; any if None.

    Raises:
        MeshError: the sizes take more devices than there are, leave a remainder, or an axis is unknown.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = fill_sizes(sizes, len(devices), axes=axes)
    count = math.prod(shape.values())
    auto = (AxisType.Auto,) * len(shape)
    chosen = devices if count == len(devices) else _first_devices(devices, count, shape)
    try:
        return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=chosen)
    except (AssertionError, NotImplementedError, ValueError):
        if count == len(devices):
            raise
        # Some of a slice's chips are no torus of their own that could be ordered.
        return Mesh(np.array(chosen).reshape(tuple(shape.values())), tuple(shape), axis_types=auto)


def _first_devices(devices: Sequence[Any], count: int, shape: Mapping[str, int]) -> list[Any]:
    """So many devices, equally many of each process: one without any could not take part."""
    owners: dict[int, list[Any]] = {}
    for device in devices:
        owners.setdefault(device.process_index, []).append(device)
    each, rest = divmod(count, len(owners))
    if rest or each > min(map(len, owners.values())):
        raise MeshError(
            f"a mesh of {shown_sizes(shape)} takes {count} of the {len(devices)} devices of {len(owners)} "
            f"processes, which cannot give equally many; choose sizes whose product is a multiple of "
            f"{len(owners)}."
        )
    return [device for held in owners.values() for device in held[:each]]


def idle_devices(mesh: Mesh) -> str | None:
    """A sentence about devices that a mesh leaves without work, and the cure; None if there are none."""
    if mesh.devices.size >= jax.device_count():
        return None
    sizes, there = dict(mesh.shape), jax.device_count()
    fitting = [name for name, size in sizes.items() if there % (mesh.devices.size // size) == 0]
    cure = f"{fitting[0]}=-1 would use all" if fitting else f"sizes whose product is {there} would use all"
    return f"the mesh {shown_sizes(sizes)} uses {mesh.devices.size} of {there} devices; {cure}."


def mesh_of(array: Any) -> Any | None:
    """The mesh over which an array lies, also of one that is traced; None where it lies on one device."""
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


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
