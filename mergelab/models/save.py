"""Saving a model as a Hugging Face folder, piece by piece from wherever its parameters lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.buffers import aligned_empty
from mergelab.checkpoints.companion_files import donor_files
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.shard_plan import TensorSpec, plan_shards
from mergelab.checkpoints.shared_writer import SharedWriter
from mergelab.errors import CheckpointError, OutputError
from mergelab.models import save
from mergelab.models.layout import (
    Box,
    blocks,
    box_shape,
    intersection,
    join,
    normalize,
    relative,
    runs,
    slices,
    whole,
)
from mergelab.models.model import Model
from mergelab.models.table import Leaf, Piece, get_leaf, stored_shapes
from mergelab.platform import usable_cores
from mergelab.processes.agreement import together

__all__ = ["SHARD_BYTES", "copy", "save_model", "save_params"]


_LINE = 64


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies `source` to `target` of equal shape and dtype; the last two axes of either may be transposed."""
    if source.itemsize <= 8:  # integers are copied faster than bfloat16; complex has none as wide
        source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
    if source.ndim < 2 or _is_transposed(source) == _is_transposed(target):
        np.copyto(target, source)
        return
    if _is_transposed(source):
        source, target = source.swapaxes(-1, -2), target.swapaxes(-1, -2)
    step = max(1, _LINE // source.itemsize)
    for index in np.ndindex(source.shape[:-2]):
        for row in range(0, source.shape[-2], step):
            lines = slice(row, row + step)
            np.copyto(target[index][lines], source[index][lines])


def _is_transposed(array: np.ndarray) -> bool:
    return array.strides[-1] > array.strides[-2]


@runtime_checkable
class TokenizerFiles(Protocol):
    """A tokenizer that can be written: `mergelab.text.Tokenizer`, which models know nothing of."""

    def files(self) -> Mapping[str, bytes]:
        """Contents by file name."""
        ...


SHARD_BYTES = 5_000_000_000
"""Bytes of weights a file holds at most, unless asked otherwise; the Hugging Face libraries' own limit."""
_BLOCK = 4 << 20


@writes_anywhere("path")
def save_model(
    model: Model,
    params: Mapping[str, Any],
    path: str | Path | WorkFolder,
    *,
    tokenizer: TokenizerFiles | str | Path | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    identity: str = "",
) -> Path:
    """Writes `config.json` and the weights, in the dtypes and bytes they have; the inverse of `load_model`.

    Where parameters lie on devices of several processes, every process must make this call, with a path that
    all of them see.

    Args:
        model: the model.
        params: its parameters, JAX arrays on any mesh or numpy arrays.
        path: a folder that is empty or does not exist; or the work folder of one, entered by the caller.
        tokenizer: the tokenizer to write beside the weights, so that the folder generates text: what
            `load_tokenizer` returns, or the model folder to copy it from. None writes none.
        files: further files by name: their content, or where to copy it from.
        shard_bytes: weights go into several files if they are larger.
        overwrite: replace a folder that mergelab wrote.
        identity: SHA-256 of all that decides the content, where the caller can tell.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty, a parameter is missing or of another shape, or the disk is full.
        CheckpointError: the folder to copy the tokenizer from has none.
        MeshError: that happened in another process.
    """
    table = model.standard().table()
    config = _with_dtype(model.hf_config, params, table)
    text = (json.dumps(config, indent=2) + "\n").encode()
    files = {"config.json": text, **_tokenizer_files(tokenizer), **(files or {})}
    return save_params(
        params,
        table,
        path,
        files=files,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        identity=identity,
    )


def _tokenizer_files(tokenizer: TokenizerFiles | str | Path | None) -> Mapping[str, bytes]:
    if tokenizer is None:
        return {}
    if not isinstance(tokenizer, str | Path):
        return tokenizer.files()
    found = donor_files(Path(tokenizer), None)
    if "tokenizer.json" not in found:
        raise CheckpointError(
            f"{tokenizer} has no tokenizer.json to save with the model; name a folder that has one."
        )
    return found


def save_params(
    params: Mapping[str, Any],
    table: Sequence[Leaf],
    path: str | Path | WorkFolder,
    *,
    files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    stem: str = "model",
    identity: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the leaves of any table; arguments and errors are those of `save_model`, config in `files`.

    `stem` is what the names of the weight files begin with; `metadata` is what `plan_shards` takes.
    """
    arrays = _arrays(params, table)
    distributed = any(isinstance(a, jax.Array) and not a.is_fully_addressable for a in arrays.values())
    plan = plan_shards(_specs(arrays), shard_bytes, metadata, stem=stem)
    with SharedWriter(path, plan, identity=identity, overwrite=overwrite, distributed=distributed) as writer:
        with together("saving the model", distributed=distributed):
            _write(arrays, writer, distributed)
        return writer.commit(files)


def _arrays(params: Mapping[str, Any], table: Sequence[Leaf]) -> dict[Leaf, Any]:
    arrays = {}
    for leaf in table:
        try:
            array = get_leaf(params, leaf)
        except (KeyError, TypeError):
            raise OutputError(
                f"the parameters lack {leaf.name!r}, which the model has; nothing was saved."
            ) from None
        if array.shape != leaf.shape:
            raise OutputError(
                f"parameter {leaf.name!r} has shape {array.shape} where the model has {leaf.shape}; nothing "
                "was saved."
            )
        arrays[leaf] = array
    unknown = len(jax.tree.leaves(params)) - len(arrays)
    if unknown:
        raise OutputError(f"there are {unknown} parameters that the model does not have; nothing was saved.")
    return arrays


def _specs(arrays: Mapping[Leaf, Any]) -> list[TensorSpec]:
    dtypes: dict[str, np.dtype[Any]] = {}
    for leaf, array in arrays.items():
        for name in leaf.hf_names:
            if dtypes.setdefault(name, array.dtype) != array.dtype:
                raise OutputError(
                    f"parameter {leaf.name!r} is {array.dtype}, but others that share the tensor {name!r} "
                    f"are {dtypes[name]}; cast them to one type."
                )
    return [TensorSpec(name, dtypes[name], shape) for name, shape in stored_shapes(arrays).items()]


def _with_dtype(
    config: Mapping[str, Any], params: Mapping[str, Any], table: Sequence[Leaf]
) -> dict[str, Any]:
    """The config with its dtype field set to the type of most bytes of the parameters."""
    sizes: Counter[str] = Counter()
    for array in _arrays(params, table).values():
        sizes[str(array.dtype)] += array.nbytes
    field = "dtype" if "dtype" in config else "torch_dtype"
    return dict(config) | ({field: max(sizes, key=lambda kind: sizes[kind])} if sizes else {})


def _write(arrays: Mapping[Leaf, Any], writer: SharedWriter, distributed: bool) -> None:
    held = {leaf: _held(array, distributed) for leaf, array in arrays.items()}
    parts: dict[str, list[tuple[Leaf, Box, Piece]]] = {}
    for leaf, shards in held.items():
        for box in shards:
            for piece in leaf.pullback(box):
                parts.setdefault(piece.hf_name, []).append((leaf, box, piece))
    last_use = {leaf: name for name, found in parts.items() for leaf, _, _ in found}
    hosts: dict[Leaf, dict[Box, np.ndarray]] = {}
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        for name, found in parts.items():
            sources: list[tuple[Box, np.ndarray]] = []
            for leaf, box, piece in found:
                if leaf not in hosts:
                    hosts[leaf] = {shard: _on_host(array) for shard, array in held[leaf].items()}
                part = hosts[leaf][box][slices(relative(piece.target, box))]
                place = leaf.layout.in_view_order(part[0] if leaf.stack else part, piece.source)
                sources.append((piece.source, place))
            view, width = found[0][0].layout.view, writer.plan.places[name].spec.dtype.itemsize
            tasks = [
                pool.submit(_write_block, writer, name, view, block, sources)
                for region in join(source for source, _ in sources)
                for block in blocks(region, _BLOCK // width)
            ]
            for task in tasks:
                task.result()
            for leaf in {leaf for leaf, _, _ in found}:
                if last_use[leaf] == name:
                    del hosts[leaf]


def _held(array: Any, distributed: bool) -> dict[Box, Any]:
    """The slices of an array that this process writes: over all processes, each element once."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        return {whole(array.shape): array} if not distributed or jax.process_index() == 0 else {}
    if distributed and array.is_fully_addressable and jax.process_index() != 0:
        return {}
    return {
        normalize(shard.index, array.shape): shard.data
        for shard in array.addressable_shards
        if shard.replica_id == 0
    }


def _on_host(array: Any) -> np.ndarray:
    """The array's values, in its own memory where that is the host's."""
    if isinstance(array, jax.Array) and next(iter(array.devices())).platform != "cpu":
        # A JAX array keeps its first host copy for as long as it lives; that of this copy goes with it.
        array = jnp.copy(array)
    return np.asarray(array)


def _write_block(
    writer: SharedWriter,
    name: str,
    view: tuple[int, ...],
    block: Box,
    sources: Sequence[tuple[Box, np.ndarray]],
) -> None:
    """Writes one block of a stored tensor, gathered from the slices that hold it."""
    shared = [(intersection(block, source), source, place) for source, place in sources]
    found = [(box, place[slices(relative(box, source))]) for box, source, place in shared if box is not None]
    data = found[0][1] if found else np.empty(0)
    if len(found) != 1 or not data.flags.c_contiguous:
        data = aligned_empty(box_shape(block), found[0][1].dtype)
        for box, place in found:
            save.copy(place, data[slices(relative(box, block))])
    starts, length = runs(view, block)
    writer.write_runs(name, starts, data.reshape(len(starts), length))
