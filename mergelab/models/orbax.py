"""Models as Orbax checkpoints: parameters with their config, on any mesh."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_files import put_file
from mergelab.checkpoints.orbax_calls import quiet_orbax
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, OutputError
from mergelab.models.families import model_from_config
from mergelab.models.load import check_dtype
from mergelab.models.model import Model, Params
from mergelab.models.table import get_leaf, stored_shapes, tree_from_leaves
from mergelab.processes.agreement import span_processes, together
from mergelab.refusals import one_line, refusal
from mergelab.sharding import DEFAULT_RULES, Rules, check_axes, named_sharding, rule_axes

__all__ = [
    "is_orbax_model",
    "is_tree",
    "load_orbax",
    "restore_tree",
    "save_orbax",
    "save_tree",
    "tree_shapes",
]


_METADATA = "_METADATA"
_MAX_DESCRIPTION = 64_000_000


def is_tree(path: Path | str) -> bool:
    """Whether a folder is an Orbax checkpoint of a tree."""
    return (Path(path) / _METADATA).is_file()


def save_tree(tree: Any, path: Path | str) -> Path:
    """Writes a tree of arrays; every process writes the shards that its devices hold.

    Orbax makes the folder under another name and renames it when it is complete.

    Args:
        tree: arrays in SAEs.
        path: a folder that does not exist, or is empty.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    import orbax.checkpoint as ocp

    out = Path(os.path.abspath(path))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"{out} is not empty; choose another folder")
    try:
        _check_writable(out.parent)
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out, tree, force=True)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        for unfinished in out.parent.glob(f"{glob.escape(out.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        why = refusal(error) or f"Orbax could not save there ({one_line(str(error))}); check the folder"
        raise OutputError(f"{out}: {why}.") from error
    return out


def _check_writable(folder: Path) -> None:
    """Makes a folder and a file in it: Orbax tells a refusal by threads that print it and never end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def tree_shapes(path: Path | str) -> dict[str, Any]:
    """The tree of a checkpoint with `jax.ShapeDtypeStruct` leaves; reads no weights.

    Raises:
        CheckpointError: the folder holds no Orbax checkpoint of a tree, or a damaged one.
    """
    import orbax.checkpoint as ocp

    folder = _existing(path)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder).item_metadata
    except Exception as error:  # Orbax raises what its parsers raise: KeyError, TypeError, ...
        raise _damaged(folder, error) from error
    tree: Any = getattr(found, "tree", found)
    if not isinstance(tree, dict):
        raise _damaged(folder, ValueError("it describes no tree of arrays"))
    return jax.tree_util.tree_map_with_path(lambda place, leaf: _shape(folder, place, leaf), tree)


def restore_tree(path: Path | str, like: Any) -> Any:
    """Reads a tree of arrays onto the devices that `like` names, whatever mesh it was saved from.

    Args:
        path: the checkpoint.
        like: the same tree with `jax.ShapeDtypeStruct` leaves: shapes, dtypes (cast to) and shardings (a leaf
            without one goes to the default device).

    Raises:
        CheckpointError: there is no such checkpoint, its tree or a shape differs, or it is damaged.
    """
    import orbax.checkpoint as ocp

    folder = _existing(path)
    _compare(folder, tree_shapes(folder), like)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device), like
    )
    try:
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, target)
    except (MemoryError, jax.errors.JaxRuntimeError):  # the arrays are too large for this machine
        raise
    except Exception as error:  # Orbax and TensorStore raise what their parsers raise
        raise _damaged(folder, error) from error


def _existing(path: Path | str) -> Path:
    folder = Path(os.path.abspath(path))
    if not is_tree(folder):
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no {_METADATA}; check the path.")
    for file in (*folder.iterdir(), *(folder / "array_metadatas").glob("*")):
        if not file.is_dir() and not (file.is_file() and file.stat().st_size <= _MAX_DESCRIPTION):
            raise CheckpointError(
                f"{file} is not a regular file of at most {_MAX_DESCRIPTION // 10**6} MB, as a description "
                "of arrays is; get the checkpoint again."
            )
    return folder


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    words = one_line(f"{type(error).__name__}: {error}")[:300]
    return CheckpointError(f"{folder} cannot be restored ({words}); the checkpoint is damaged.")


def _shape(folder: Path, place: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array as its description says them."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    sizes = isinstance(shape, tuple) and all(isinstance(d, int) and 0 <= d < 2**63 for d in shape)
    if shape is None or not sizes or dtype is None:
        name = jax.tree_util.keystr(place, simple=True, separator=".")
        raise CheckpointError(f"{folder}: {name!r} is not an array with a shape and a dtype; save it again.")
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def _compare(folder: Path, stored: Any, like: Any) -> None:
    found, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree.leaves_with_path(stored), jax.tree.leaves_with_path(like))
    )
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder}: array {name!r} is {found.get(name, 'missing')} where the model has "
                f"{wanted.get(name, 'none')}; restore it with the model it was saved from."
            )


_PARAMS = "params"
_TENSORS = "tensors.json"


def is_orbax_model(path: str | Path) -> bool:
    """Whether `load_orbax` is the way to load this folder."""
    return is_tree(Path(path) / _PARAMS)


@writes_anywhere("path")
def save_orbax(
    model: Model,
    params: Params,
    path: str | Path | WorkFolder,
    *,
    files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    identity: str = "",
) -> Path:
    """Writes a model as an Orbax folder; every process of its mesh must make this call.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        path: a folder that is empty or does not exist; or the work folder of one, entered by the caller (in
            process 0).
        files: further files by name (tokenizer): their content, or where to copy it from.
        overwrite: replace a folder that mergelab wrote.
        identity: SHA-256 of all that decides the content, where the caller can tell.

    Raises:
        OutputError: the folder is not empty, is being written by another run, or cannot be written.
        MeshError: writing failed in another process.
    """
    distributed = jax.process_count() > 1 and any(not a.is_fully_addressable for a in jax.tree.leaves(params))
    first = not distributed or jax.process_index() == 0
    work = path if isinstance(path, WorkFolder) else WorkFolder(path, overwrite=overwrite)
    data = {
        "config.json": dict(model.hf_config),
        _TENSORS: {"names": [*stored_shapes(model.standard().table())]},
    }
    texts = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in data.items()}
    with contextlib.ExitStack() as held:
        with together("preparing the output", distributed=distributed):
            if first:
                if work is not path:
                    held.enter_context(work)
                work.prepare(sum(array.nbytes for array in jax.tree.leaves(params)))
                with disk_errors(work.out):
                    work.clear()
        try:
            save_tree(params, work.path / _PARAMS)
            with together("writing the config", distributed=distributed):
                if first:
                    _add(work, {**texts, **(files or {})})
                    work.publish(identity)
        except BaseException:
            if first:
                work.clear(recreate=False)
            raise
    return work.out


def _add(work: WorkFolder, files: Mapping[str, bytes | Path]) -> None:
    with disk_errors(work.out):
        for name, content in files.items():
            put_file(work.path, name, content)


def load_orbax(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, rules: Rules | None = None
) -> tuple[Model, Params]:
    """Loads what `save_orbax` wrote, onto any mesh; arguments and errors are those of `load_model`."""
    folder = local_path(path)
    if mesh is not None:
        check_axes(mesh.axis_names, rule_axes(DEFAULT_RULES if rules is None else rules))
    distributed = mesh is not None and span_processes(mesh.devices.flat)
    with together("opening the model", distributed=distributed):
        if not is_orbax_model(folder):
            raise CheckpointError(
                f"{folder} is not a model in Orbax form: it has no {_PARAMS}/; check the path."
            )
        model = model_from_config(read_json_object(folder / "config.json"), str(folder / "config.json"))
        names = read_json_object(folder / _TENSORS).get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{folder / _TENSORS} lists no tensor names; save the model again.")
        model = model.for_tensors(names)
        stored = tree_shapes(folder / _PARAMS)
        wanted = None if dtype is None else check_dtype(dtype)
        like = {}
        for leaf in model.table():
            try:
                kind = wanted or get_leaf(stored, leaf).dtype
            except (KeyError, TypeError):
                raise CheckpointError(
                    f"{folder} lacks the parameter {leaf.name!r}, which its config.json calls for; save the "
                    "model again."
                ) from None
            sharding = None
            if mesh is not None:
                sharding = named_sharding(
                    mesh, leaf.shape, leaf.axes, DEFAULT_RULES if rules is None else rules
                )
            like[leaf] = jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)
    return model, restore_tree(folder / _PARAMS, tree_from_leaves(like))
