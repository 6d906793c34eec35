"""Loads a model onto one device or a mesh: each process reads just the slices that its own devices hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mergelab.checkpoints.dtypes import dtype_from_name, is_float
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.errors import CheckpointError, did_you_mean, first_faults
from mergelab.models.families import model_from_config
from mergelab.models.handed_on import RowShares, row_shares
from mergelab.models.layout import Box, box_size, normalize, whole
from mergelab.models.model import Model, Params
from mergelab.models.shard_reader import PendingLeaf, ShardReader
from mergelab.models.table import Leaf, stored_shapes, tree_from_leaves
from mergelab.platform import trim_memory
from mergelab.processes.agreement import span_processes, together
from mergelab.sharding import DEFAULT_RULES, Rules, check_axes, named_sharding, rule_axes

__all__ = ["check_dtype", "load_model", "load_params", "parameter_shapes"]

_TRIMMED = 64 << 20
"""Bytes loaded between two calls that give free memory back: casts and copies leave theirs in the heap."""


def load_model(
    path: str | Path | Checkpoint,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
) -> tuple[Model, Params]:
    """Opens a Hugging Face model folder and loads its weights.

    Bytes go from the file to the device that holds them: beside the loaded arrays, the host needs memory for
    two parameters (their local parts, where a mesh spans processes), however large the model. With a mesh
    that spans processes, every process of the mesh must make this call.

    Args:
        path: a model folder or weight file; a model on the Hugging Face hub, written
            `org/name[@revision][:subfolder]`; a URL such as `gs://bucket/model`; or a checkpoint that is open
            already (`with_lora(...)`).
        mesh: where the weights go (`mergelab.sharding.make_mesh`); JAX's default device if None.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `DEFAULT_RULES` if None.

    Raises:
        CheckpointError: the folder, its config or a tensor is missing, unknown, damaged, or of another shape.
        NonFiniteError: a weight leaves the range of `dtype`.
        MeshError: a rule is missing, the mesh has an axis that no rule names, or another process failed.
    """
    if mesh is not None:
        check_axes(mesh.axis_names, rule_axes(DEFAULT_RULES if rules is None else rules))
    distributed = mesh is not None and span_processes(mesh.devices.flat)
    with together("opening the model", distributed=distributed):
        checkpoint = open_checkpoint(path) if isinstance(path, str | Path) else path
        place = str(checkpoint.path)
        model = _model_of(checkpoint)
        _note_what_is_left_out(model, checkpoint.tensors, place)
    params = load_params(
        checkpoint.tensors, model.table(), place, unused=model.is_unused, mesh=mesh, dtype=dtype, rules=rules
    )
    return model, params


def parameter_shapes(checkpoint: Checkpoint, *, dtype: Any = None) -> tuple[Model, Params]:
    """The model of an open checkpoint, and shape and dtype of each parameter that `load_model` will load.

    Args:
        checkpoint: its weights are not read.
        dtype: the parameters' dtype; the stored one if None.

    Returns:
        The model, and a tree of `jax.ShapeDtypeStruct` in the place of its parameters.

    Raises:
        CheckpointError: as `load_model`.
    """
    model, tensors = _model_of(checkpoint), checkpoint.tensors
    wanted = None if dtype is None else check_dtype(dtype)
    dtypes = _check(tensors, model.table(), str(checkpoint.path), model.is_unused, wanted)
    return model, tree_from_leaves(
        {leaf: jax.ShapeDtypeStruct(leaf.shape, found) for leaf, found in dtypes.items()}
    )


def _model_of(checkpoint: Checkpoint) -> Model:
    model = model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
    return model.for_tensors(checkpoint.tensors)


def _note_what_is_left_out(model: Model, names: Iterable[str], place: str) -> None:
    """Warns of heads and towers that the files hold and the model does not; buffers are nobody's loss."""
    kinds = {name: model.why_unused(name) for name in names}
    heads = [name for name, why in kinds.items() if why == "head"]
    towers = [name for name, why in kinds.items() if why == "tower"]
    if heads:
        warnings.warn(
            f"{place} holds another head, which is not loaded: {', '.join(first_faults(heads))}.",
            stacklevel=3,
        )
    if towers:
        warnings.warn(
            f"{place} holds {len(towers):,} tensors of other towers, such as {towers[0]!r}; only the text "
            f"tower is loaded, as {model.family.model_type!r}.",
            stacklevel=3,
        )


def load_params(
    tensors: Mapping[str, TensorSource],
    table: Sequence[Leaf],
    place: str,
    *,
    unused: Callable[[str], bool] = lambda name: False,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
) -> Params:
    """Loads the leaves of any table; arguments and errors are those of `load_model`.

    Args:
        tensors: the tensors of an open checkpoint.
        table: what to load.
        place: the checkpoint's path, for messages.
        unused: whether the checkpoint may hold a tensor of this name that no leaf needs.
        mesh: where to load to.
        dtype: the parameters' dtype.
        rules: logical axis -> mesh axes.
    """
    rules = DEFAULT_RULES if rules is None else rules
    distributed = mesh is not None and span_processes(mesh.devices.flat)
    with together("loading the model", distributed=distributed):
        dtypes = _check(tensors, table, place, unused, None if dtype is None else check_dtype(dtype))
        shardings = {
            leaf: None if mesh is None else named_sharding(mesh, leaf.shape, leaf.axes, rules)
            for leaf in table
        }
        handed = _handed_on(tensors, shardings) if distributed else {}
    with together("loading the model", distributed=distributed), ShardReader(tensors) as reader:
        work = _Loading(reader, dtypes, shardings, handed)
        # One leaf is read while the one before it goes to the devices.
        pending: tuple[Leaf, PendingLeaf | None] | None = None
        untrimmed = 0
        for leaf in table:
            following = leaf, work.start(leaf)
            if pending is not None:
                work.finish(*pending)
                untrimmed += work.arrays[pending[0]].nbytes if pending[0] in work.arrays else 0
            if untrimmed >= _TRIMMED:
                trim_memory()
                untrimmed = 0
            pending = following
        if pending is not None:
            work.finish(*pending)
        if work.error is not None:
            raise work.error
    return tree_from_leaves(work.arrays)


class _Loading:
    """Leaves on their way to the devices, and the error that ends it.

    Where leaves are handed on, a process that cannot read takes part to the end, with zeros: the others wait
    for it, and hear of the error when all are through.
    """

    def __init__(
        self,
        reader: ShardReader,
        dtypes: Mapping[Leaf, np.dtype[Any]],
        shardings: Mapping[Leaf, NamedSharding | None],
        handed: Mapping[Leaf, RowShares],
    ) -> None:
        self.reader, self.dtypes, self.shardings, self.handed = reader, dtypes, shardings, handed
        self.arrays: dict[Leaf, jax.Array] = {}
        self.error: Exception | None = None

    def start(self, leaf: Leaf) -> PendingLeaf | None:
        if self.error is not None:
            return None
        if leaf in self.handed:
            boxes = [box for box in self.handed[leaf].boxes.values() if box_size(box)]
        else:
            boxes = _boxes(leaf, self.shardings[leaf])
        try:
            return self.reader.start(leaf, boxes, self.dtypes[leaf])
        except Exception as caught:
            self._fail(caught)
            return None

    def finish(self, leaf: Leaf, reading: PendingLeaf | None) -> None:
        read: Mapping[Box, np.ndarray] | None = None
        if reading is not None and self.error is None:
            try:
                read = reading.wait()
            except Exception as caught:
                self._fail(caught)
        if leaf in self.handed:
            array = self.handed[leaf].hand_on(read, self.dtypes[leaf])
        elif read is not None:
            array = _to_devices(leaf, read, self.shardings[leaf])
        else:
            return
        jax.block_until_ready(array)  # only two leaves are on the host at a time
        self.arrays[leaf] = array
        for part in (read or {}).values():
            self.reader.give_back(part)

    def _fail(self, error: Exception) -> None:
        if not self.handed:
            raise error
        self.error = error


def _handed_on(
    tensors: Mapping[str, TensorSource], shardings: Mapping[Leaf, NamedSharding | None]
) -> dict[Leaf, RowShares]:
    """The leaves that would be read in short runs, and how they are read instead."""
    found = {}
    for leaf, sharding in shardings.items():
        assert sharding is not None
        itemsize = tensors[leaf.hf_names[0]].dtype.itemsize
        if (shares := row_shares(leaf, sharding, itemsize)) is not None:
            found[leaf] = shares
    return found


def _boxes(leaf: Leaf, sharding: NamedSharding | None) -> list[Box]:
    """The different slices of a leaf that this process's devices hold."""
    if sharding is None:
        return [whole(leaf.shape)]
    indices = sharding.addressable_devices_indices_map(leaf.shape).values()
    return list(dict.fromkeys(normalize(index, leaf.shape) for index in indices if index is not None))


def _to_devices(leaf: Leaf, read: Mapping[Box, np.ndarray], sharding: NamedSharding | None) -> jax.Array:
    """Puts what was read on the devices."""
    # On a CPU the memory becomes the array's own, unless it is transposed: JAX transposes on the way to the
    # device, several times as fast as numpy could.
    if sharding is None:
        return jax.device_put(read[whole(leaf.shape)], may_alias=True)
    parts = [
        jax.device_put(read[normalize(index, leaf.shape)], device, may_alias=True)
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        if index is not None
    ]
    dtype = next(iter(read.values())).dtype if read else None
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts, dtype=dtype)


def check_dtype(dtype: Any) -> np.dtype[Any]:
    """The float type that a name or dtype means; raises `CheckpointError` if there is none."""
    found = dtype_from_name(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    if not is_float(found):
        raise CheckpointError(f"a model cannot be loaded as {found}; choose a float type such as bfloat16.")
    return found


def _check(
    tensors: Mapping[str, TensorSource],
    table: Sequence[Leaf],
    place: str,
    unused: Callable[[str], bool],
    dtype: np.dtype[Any] | None,
) -> dict[Leaf, np.dtype[Any]]:
    """Checks that tensors and table are a one-to-one match; returns the dtype every leaf will have."""
    shapes = stored_shapes(table)
    for name in tensors:
        if name not in shapes and not unused(name):
            raise CheckpointError(
                f"{place} has the tensor {name!r}, which config.json leaves no use for"
                f"{did_you_mean(name, shapes)}; correct config.json, or remove the tensor."
            )
    for name, shape in shapes.items():
        source = tensors.get(name)
        if source is None:
            raise CheckpointError(
                f"{place} lacks the tensor {name!r}{did_you_mean(name, tensors)}, which its config.json "
                "calls for; the download may be incomplete."
            )
        if source.shape != shape or not is_float(source.dtype):
            raise CheckpointError(
                f"{place}: tensor {name!r} is {source.dtype} {list(source.shape)}, but config.json asks for "
                f"floating-point {list(shape)}; use the config.json that belongs to the weights."
            )
    return {leaf: dtype or _stored_dtype(tensors, leaf, place) for leaf in table}


def _stored_dtype(tensors: Mapping[str, TensorSource], leaf: Leaf, place: str) -> np.dtype[Any]:
    kinds = sorted({str(tensors[name].dtype) for name in leaf.hf_names})
    if len(kinds) > 1:
        raise CheckpointError(
            f"{place}: the tensors of {leaf.name!r} are of different types ({', '.join(kinds)}), but they "
            "become one array; pass the dtype to load."
        )
    dtype = tensors[leaf.hf_names[0]].dtype
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{place}: tensor {leaf.hf_names[0]!r} is float64, which JAX would round to float32 as it is set "
            "up; pass dtype='float32', or enable jax_enable_x64."
        )
    return dtype
