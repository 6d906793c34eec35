"""A model as an Orbax folder: `config.json`, and in `params/` the parameters as this library keeps them.

`tensors.json` lists the HF tensors the parameters came from: files of one configuration may differ in them (a
prefix of all names, a pooling layer), and going back to HF files must restore those.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.model_files import check_file_name
from mergelab.checkpoints.orbax import is_tree, restore_tree, save_tree, tree_shapes
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.models.declaration import get_leaf, stored_shapes, tree_from_leaves
from mergelab.models.families import model_from_config
from mergelab.models.load import check_dtype
from mergelab.models.model import Model, Params
from mergelab.processes import span_processes, together
from mergelab.sharding import DEFAULT_RULES, Rules, named_sharding

__all__ = ["is_orbax_model", "load_orbax", "save_orbax"]

_PARAMS = "params"
_TENSORS = "tensors.json"


def is_orbax_model(path: str | Path) -> bool:
    """Whether `load_orbax` is the way to load this folder."""
    return is_tree(Path(path) / _PARAMS)


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
    data = {"config.json": dict(model.hf_config), _TENSORS: {"names": [*stored_shapes(model.table())]}}
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
            target = work.path / check_file_name(name, "the output")
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)


def load_orbax(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, rules: Rules | None = None
) -> tuple[Model, Params]:
    """Loads what `save_orbax` wrote, onto any mesh; arguments and errors are those of `load_model`."""
    folder = Path(path)
    distributed = mesh is not None and span_processes(mesh.devices.flat)
    with together("opening the model", distributed=distributed):
        if not is_orbax_model(folder):
            raise CheckpointError(
                f"{folder} is no model in Orbax form: it has no {_PARAMS}/; check the path."
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
