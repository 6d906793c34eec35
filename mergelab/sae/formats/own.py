"""The library's own files: `cfg.json` and `sae.safetensors`, ready to use on raw activations."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, OutputError, SAEError
from mergelab.models.declaration import Leaf
from mergelab.models.load import load_params
from mergelab.models.save import save_params
from mergelab.sae.dictionary import LATENT_AXIS, Dictionary, DictionaryConfig
from mergelab.sae.formats.convert import check_finite, check_sizes

__all__ = ["FORMAT", "read_own", "write_folder", "write_own"]

FORMAT = "mergelab-sae-1"
"""The value of `format` in `cfg.json`."""

_CFG, _WEIGHTS = "cfg.json", "sae.safetensors"
_WHOLE = 1 << 62  # one file, however large
_AXES = {
    "W_enc": ("d_in", "n_latents"), "b_enc": ("n_latents",), "W_dec": ("n_latents", "d_out"),
    "b_dec": ("d_out",), "threshold": ("n_latents",), "W_skip": ("d_in", "d_out"),
    "magnitude_scale": ("n_latents",),
    "magnitude_bias": ("n_latents",),
}  # fmt: skip


def write_own(dictionary: Dictionary, path: Path) -> None:
    """Writes `cfg.json` and `sae.safetensors` into a new folder.

    The tensors are those of `Dictionary`: `W_enc [d_in, n]`, `b_enc [n]`, `W_dec [n, d_out]`, `b_dec
    [d_out]`, and what the activation needs besides. Where they lie on devices of several processes, every
    process makes this call with a path that all of them see, and writes what its devices hold.

    Raises:
        OutputError: the folder is not empty, or the disk is full or fails.
        MeshError: that happened in another process.
    """
    settings = asdict(dictionary.config)
    sizes = {"d_in": dictionary.d_in, "d_out": dictionary.d_out, "n_latents": dictionary.n_latents}
    text = json.dumps({"format": FORMAT, **sizes, **settings}, indent=2) + "\n"
    arrays = dictionary.arrays()
    table = _table({name: value.shape for name, value in arrays.items()})
    save_params(arrays, table, path, files={_CFG: text.encode()}, shard_bytes=_WHOLE, stem="sae")


def _table(shapes: Mapping[str, tuple[int, ...]]) -> list[Leaf]:
    """Rows for the arrays of a dictionary; the axis of latents is called so."""
    n = shapes["W_dec"][0]
    rows = []
    for name, shape in shapes.items():
        axis = LATENT_AXIS.get(name)
        axes = tuple("latents" if place == axis else None for place in range(len(shape)))
        if axis is not None and shape[axis : axis + 1] != (n,):
            raise SAEError(f"{name} has shape {list(shape)}, but there are {n} latents.")
        rows.append(Leaf((name,), name, shape, axes=axes))
    return rows


def write_folder(
    path: Path, texts: Mapping[str, str], tensors: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Makes a folder of texts and safetensors files; it appears under its name when it is complete.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is not empty; choose another folder")
    work = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, text in texts.items():
            (work / name).write_text(text)
        for name, arrays in tensors.items():
            save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, work / name)
        if path.exists():
            path.rmdir()
        work.rename(path)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror}); check the disk") from error


def read_own(path: Path, mesh: Mesh | None = None) -> Dictionary:
    """Reads what `write_own` wrote.

    Args:
        path: the folder.
        mesh: splits the latents over its axis `latents`, if it has one: each process reads what its devices
            hold. JAX's default device if None.

    Raises:
        CheckpointError: a file is missing, or says things that do not fit together.
        NonFiniteError: a tensor holds NaN or infinity.
        MeshError: another process failed.
    """
    settings: dict[str, Any] = dict(read_json_object(path / _CFG))
    if settings.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path / _CFG}: expected format {FORMAT!r}; it was written by something else")
    sizes = {name: settings.pop(name, None) for name in ("d_in", "d_out", "n_latents")}
    tensors = open_safetensors(path / _WEIGHTS).tensors
    known = [field for field in Dictionary.__dataclass_fields__ if field != "config"]
    unknown = [name for name in tensors if name not in known]
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    if unknown or missing:
        said = f"has no tensor {missing[0]!r}" if missing else f"has a tensor {unknown[0]!r} of no known use"
        raise CheckpointError(f"{path / _WEIGHTS}: {said}; write the dictionary again")
    for name, tensor in tensors.items():
        axes = 2 if name.startswith("W_") else 1
        if len(tensor.shape) != axes or not is_float(tensor.dtype):
            raise CheckpointError(
                f"{path / _WEIGHTS}: {name} is {tensor.dtype} {list(tensor.shape)}, where floats with {axes} "
                f"{'axes' if axes > 1 else 'axis'} were expected; write the dictionary again"
            )
    check_sizes(
        path / _WEIGHTS,
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: _AXES[name] for name in known},
        path / _CFG,
        {name: (name, value) for name, value in sizes.items()},
    )
    split = "latents" if mesh is not None and "latents" in mesh.axis_names else None
    try:
        table = _table({name: tensor.shape for name, tensor in tensors.items()})
        arrays = load_params(tensors, table, str(path / _WEIGHTS), mesh=mesh, rules={"latents": split})
        found = Dictionary(**arrays, config=DictionaryConfig(**settings)).checked()
    except (SAEError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, values in arrays.items():
        check_finite(path / _WEIGHTS, name, values)
    mine = {"d_in": found.d_in, "d_out": found.d_out, "n_latents": found.n_latents}
    if sizes != mine:
        raise CheckpointError(f"{path / _CFG}: says {sizes}, but the tensors have {mine}")
    return found
