"""Trees of arrays in Orbax checkpoints: saved in parallel by all processes, restored onto any mesh."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mergelab.checkpoints.orbax_calls import quiet_orbax
from mergelab.errors import CheckpointError, OutputError
from mergelab.refusals import one_line, refusal

__all__ = ["is_tree", "restore_tree", "save_tree", "tree_shapes"]

_METADATA = "_METADATA"
_MAX_DESCRIPTION = 64_000_000


def is_tree(path: Path | str) -> bool:
    """Whether a folder is an Orbax checkpoint of a tree."""
    return (Path(path) / _METADATA).is_file()


def save_tree(tree: Any, path: Path | str) -> Path:
    """Writes a tree of arrays; every process writes the shards that its devices hold.

    Orbax makes the folder under another name and renames it when it is complete.

    Args:
        tree: arrays in dictionaries.
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
        raise CheckpointError(f"{folder} is no Orbax checkpoint: it has no {_METADATA}; check the path.")
    for file in (*folder.iterdir(), *(folder / "array_metadatas").glob("*")):
        if not file.is_dir() and not (file.is_file() and file.stat().st_size <= _MAX_DESCRIPTION):
            raise CheckpointError(
                f"{file} is no regular file of at most {_MAX_DESCRIPTION // 10**6} MB, as a description of "
                "arrays is; get the checkpoint again."
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
        raise CheckpointError(f"{folder}: {name!r} is no array with a shape and a dtype; save it again.")
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
