"""A model as an Orbax folder: `config.json`, and in `params/` the parameters as this library keeps them.

`tensors.json` lists the HF tensors the parameters came from: files of one configuration may differ in them (a
prefix of all names, a pooling layer), and going back to HF files must restore those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mergelab.checkpoints.file_names import check_file_name
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.orbax import is_tree, restore_tree, save_tree, tree_shapes
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
    path: str | Path,
    *,
    files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model as an Orbax folder; every process of its mesh must make this call.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        path: a folder; its `params` is written, other files in it stay.
        files: further files by name (tokenizer): their content, or where to copy it from.
        overwrite: replace parameters that are there.

    Raises:
        OutputError: there are parameters already, or the folder cannot be written.
        MeshError: writing failed in another process.
    """
    out = Path(path)
    distributed = jax.process_count() > 1 and any(not a.is_fully_addressable for a in jax.tree.leaves(params))
    save_tree(params, out / _PARAMS, overwrite=overwrite)
    data = {"config.json": dict(model.hf_config), _TENSORS: {"names": [*stored_shapes(model.table())]}}
    texts = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in data.items()}
    with together("writing the config", distributed=distributed):
        if not distributed or jax.process_index() == 0:
            for name, content in {**texts, **(files or {})}.items():
                target = out / check_file_name(name, "the output")
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
                    target.write_bytes(content)
    return out


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
