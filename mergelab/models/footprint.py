"""What a folder holds, takes of a mesh, and costs when it is compiled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mergelab.aot import ChipReport, chip_kind, chip_of, compile_for_topology, device_count, slices
from mergelab.checkpoints import FolderCheckpoint, TensorSource, open_checkpoint
from mergelab.checkpoints.gguf.tensors import GgufTensor
from mergelab.checkpoints.headers import headers_only
from mergelab.checkpoints.quantized import BoxSource
from mergelab.errors import CheckpointError, MeshError, first_faults
from mergelab.models.cache import Recurrent
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.table import Leaf, stored_shapes, tree_from_leaves
from mergelab.sharding import (
    DEFAULT_RULES,
    Rules,
    check_axes,
    fill_sizes,
    named_sharding,
    rule_axes,
    shown_sizes,
)

__all__ = [
    "Footprint",
    "Inventory",
    "PassOnSlice",
    "compile_forward",
    "footprint",
    "lower_forward",
    "smallest_for_pass",
    "take_inventory",
]


@dataclass(frozen=True)
class Inventory:
    """A model folder, without its weights.

    Attributes:
        checkpoint: the opened folder.
        model: the model its config describes, or None if it cannot be run here.
        faults: why it cannot be run, or where weights and config disagree; one sentence each.
    """

    checkpoint: FolderCheckpoint
    model: Model | None
    faults: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of stored elements, over all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.checkpoint.tensors.values())

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes of each stored type, most first: dtypes (of codes and scales), and types of GGUF blocks."""
        found: Counter[str] = Counter()
        for tensor in self.checkpoint.tensors.values():
            if isinstance(tensor, GgufTensor):
                found[tensor.form or str(tensor.dtype)] += tensor.stored_bytes
                continue
            for part in tensor.parts if isinstance(tensor, BoxSource) else (tensor,):
                found[str(part.dtype)] += math.prod(part.shape) * part.dtype.itemsize
        return dict(found.most_common())

    def dtype_of(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype that a leaf is read in; that of most bytes for a leaf no tensor stores."""
        tensors = self.checkpoint.tensors
        tensor = tensors.get(leaf.hf_names[0])
        return _usual_dtype(tensors.values()) if tensor is None else tensor.dtype


def _usual_dtype(tensors: Iterable[TensorSource]) -> np.dtype[Any]:
    """The dtype of most bytes as they are read."""
    found: Counter[np.dtype[Any]] = Counter()
    for tensor in tensors:
        found[tensor.dtype] += math.prod(tensor.shape) * tensor.dtype.itemsize
    return found.most_common(1)[0][0]


def take_inventory(path: Path | str) -> Inventory:
    """Opens a model folder or weight file, reading headers and config only.

    Of a model on the Hugging Face hub or at a URL no more than these is fetched. A model whose family is
    unknown still has an inventory of tensors, and so has one that is quantized in a way that cannot be read:
    its tensors are those that the files hold.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    with headers_only(path) as seen:
        try:
            checkpoint = open_checkpoint(seen)
        except CheckpointError as error:
            # What is wrong with the files themselves is raised again.
            return Inventory(open_checkpoint(seen, as_stored=True), None, error.faults)
        return _inventory(checkpoint)


def _inventory(checkpoint: FolderCheckpoint) -> Inventory:
    if not checkpoint.config:
        return Inventory(checkpoint, None, (f"{checkpoint.path} has no config.json: its family is unknown.",))
    try:
        model = model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
        model = model.for_tensors(checkpoint.tensors)
    except CheckpointError as error:
        return Inventory(checkpoint, None, (str(error),))
    return Inventory(checkpoint, model, first_faults(_disagreements(model, checkpoint)))


def _disagreements(model: Model, checkpoint: FolderCheckpoint) -> list[str]:
    """One sentence for each tensor that config and headers see differently."""
    expected, found = stored_shapes(model.table()), checkpoint.tensors
    faults = [f"the tensor {name!r} is missing." for name in expected if name not in found]
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[name])}"
            faults.append(f"the tensor {name!r} is {shapes}.")
        elif name not in expected and not model.is_unused(name):
            faults.append(f"config.json leaves no use for the tensor {name!r}.")
    return faults


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device of a mesh; all devices hold equally much.

    Attributes:
        mesh: its axes and their sizes.
        parameters: bytes of parameters on one device.
        whole: bytes, among these, of parameters that every device holds in full.
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
        MeshError: a size is not positive, an axis or a rule is unknown.
    """
    check_axes(mesh, rule_axes(rules))
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
        width = max(dtype_of(leaf).itemsize for leaf in model.table())
        for layer, count in Counter(block.kept for block in model.config.blocks).items():
            if isinstance(layer, Recurrent):
                rest = len(layer.memory) - 1
                arrays = [
                    ((batch, *layer.window), ("batch", None, "heads"), width),
                    ((batch, *layer.memory), ("batch", "heads", *[None] * rest), 4),
                ]
            else:
                axes = ("batch", "length", "kv_heads", None)
                arrays = [((batch, cache_length, *shape), axes, width) for shape in layer]
            for shape, axes, size in arrays:
                part = named_sharding(devices, shape, axes, rules).shard_shape(shape)
                cache += count * math.prod(part) * size
    return Footprint(dict(mesh), parameters, whole, total, cache)


def compile_forward(
    model: Model,
    topology: str,
    mesh: Mapping[str, int],
    *,
    batch: int,
    length: int,
    dtype: str = "bfloat16",
    rules: Rules = DEFAULT_RULES,
    timeout: float = 900.0,
) -> ChipReport:
    """Compiles `model.apply` for a TPU topology; needs no TPU. It proves what fits, never how fast it is.

    Args:
        model: the model.
        topology: such as `v5e:4x4`, `v6e:16x16`, `v5p:4x8x8`.
        mesh: the sizes of the mesh's axes; one may be -1.
        batch: sequences in the pass, over all chips.
        length: tokens of each.
        dtype: dtype of parameters and activations.
        rules: logical axis -> mesh axes.
        timeout: seconds after which the compiler is stopped.

    Raises:
        DependencyError: the TPU compiler is not installed.
        MeshError: no such topology, or a mesh that does not fit it. A pass that takes more memory than a chip
            has is no error: `ChipReport.fits` says so; parameters and tokens that do are not compiled.
    """
    devices, place = device_count(topology), f"chips of {topology}"
    sizes = fill_sizes(mesh, devices, axes=rule_axes(rules), all_of_them=True, place=place)
    held = footprint(model, sizes, lambda leaf: np.dtype(jnp.dtype(dtype)), rules=rules).parameters
    if held > chip_of(topology).usable:
        nothing = dict.fromkeys(("outputs", "aliased", "temporaries"), 0)
        return ChipReport(devices, chip_kind(topology), held, **nothing, **_UNKNOWN, fits=False)
    request = {
        "config": dict(model.hf_config),
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "rules": {name: [to] if isinstance(to, str) else to for name, to in rules.items()},
    }
    report = compile_for_topology(f"{__name__}:lower_forward", topology, sizes, request, timeout=timeout)
    return report if report.fits else replace(report, arguments=held)


_UNKNOWN: dict[str, Any] = {"flops": 0.0, "traffic": 0.0, "collectives": (), "seconds": 0.0}


@dataclass(frozen=True)
class PassOnSlice:
    """A forward pass as it was compiled for a slice.

    Attributes:
        topology: the slice.
        mesh: sizes of the axes.
        report: the compiled pass.
    """

    topology: str
    mesh: Mapping[str, int]
    report: ChipReport


def smallest_for_pass(
    model: Model,
    kind: str,
    *,
    batch: int,
    length: int,
    dtype: str = "bfloat16",
    known: ChipReport | None = None,
    most: int = 256,
    tell: Callable[[str], None] | None = None,
) -> PassOnSlice | None:
    """The smallest slice of a kind of chip on which a forward pass fits.

    Arithmetic chooses on each slice the axes `fsdp` and `tensor` that leave a chip the fewest parameters, and
    passes over what cannot fit; the compiler decides, four times at most.

    Args:
        model: the model.
        kind: kind of chip, or a slice of it.
        batch: sequences in the pass, over all chips.
        length: tokens of each.
        dtype: dtype of parameters and activations.
        known: report of a pass that did not fit, whose temporaries, over all its chips, correct the estimate.
        most: largest number of chips.
        tell: function that is told what is compiled.

    Returns:
        None where none was found.

    Raises:
        MergelabError: as `compile_forward`.
    """
    usable, working, tries = chip_of(kind).usable, 0, 0
    if known is not None:
        working = known.temporaries * known.chips
    for topology in slices(kind, most):
        devices = device_count(topology)
        # Of equals the one with most of `tensor`, which splits what is computed, too.
        splits = [n for n in range(devices, 0, -1) if devices % n == 0]
        sized = [
            (footprint(model, mesh, lambda leaf: np.dtype(jnp.dtype(dtype))).parameters, mesh)
            for mesh in ({"fsdp": devices // tensor, "tensor": tensor} for tensor in splits)
        ]
        held, mesh = min(sized, key=lambda pair: pair[0])
        if held + working // devices > usable:
            continue
        if tell is not None:
            tell(f"compiling for {topology} as {shown_sizes(mesh)}")
        report = compile_forward(model, topology, mesh, batch=batch, length=length, dtype=dtype)
        if report.fits:
            return PassOnSlice(topology, mesh, report)
        tries += 1
        if tries == _TRIES:
            return None
        working = max(working, report.temporaries * report.chips)
    return None


_TRIES = 4


def lower_forward(mesh: Mesh, request: Mapping[str, Any]) -> jax.stages.Lowered:
    """The forward pass as the compiler's process builds it from a request of `compile_forward`."""
    rules = {name: tuple(to) if to else None for name, to in request["rules"].items()}
    model = model_from_config(request["config"])
    dtype = jnp.dtype(request["dtype"])

    def array(shape: tuple[int, ...], kind: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=named_sharding(mesh, shape, axes, rules))

    params = tree_from_leaves({leaf: array(leaf.shape, dtype, leaf.axes) for leaf in model.table()})
    tokens = array((request["batch"], request["length"]), jnp.int32, ("batch", "length"))

    def forward(params: Any, tokens: jax.Array) -> Any:
        found = model.apply(params, tokens)
        return found.hidden if found.logits is None else found.logits

    return jax.jit(forward).lower(params, tokens)
