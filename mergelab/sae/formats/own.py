"""The library's own files: `cfg.json` and `sae.safetensors`, ready to use on raw activations."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.new_files import check_new_folder, write_tensors
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError, OutputError, SAEError
from mergelab.models.load import load_params
from mergelab.models.save import save_params
from mergelab.models.table import Leaf
from mergelab.sae.formats.card import sae_card
from mergelab.sae.formats.file_format import FileFormat, Found, Signature
from mergelab.sae.formats.settings import faults_at_once
from mergelab.sae.formats.shared import check_finite, check_sizes
from mergelab.sae.sae import LATENT_AXIS, SAE, SAEConfig

__all__ = ["FORMAT", "OWN", "read_own", "write_folder", "write_own"]

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


def write_own(sae: SAE, path: Path | WorkFolder, *, overwrite: bool = False) -> None:
    """Writes `cfg.json` and `sae.safetensors` into a new folder.

    The tensors are those of `SAE`: `W_enc [d_in, n]`, `b_enc [n]`, `W_dec [n, d_out]`, `b_dec
    [d_out]`, and what the activation needs besides. Where they lie on devices of several processes, every
    process makes this call with a path that all of them see, and writes what its devices hold.

    Args:
        sae: SAE to write.
        path: a new folder, or the work folder of one.
        overwrite: replace a folder that mergelab wrote.

    Raises:
        OutputError: the folder is not empty, or the disk is full or fails.
        MeshError: that happened in another process.
    """
    settings = asdict(sae.config)
    sizes = {"d_in": sae.d_in, "d_out": sae.d_out, "n_latents": sae.n_latents}
    text = json.dumps({"format": FORMAT, **sizes, **settings}, indent=2) + "\n"
    arrays = sae.arrays()
    table = _table({name: value.shape for name, value in arrays.items()})
    files = {_CFG: text.encode(), "README.md": sae_card(sae)}
    if any(isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays.values()):
        save_params(arrays, table, path, files=files, shard_bytes=_WHOLE, overwrite=overwrite, stem="sae")
        return
    identity = _identity({_CFG: text}, {_WEIGHTS: sae.as_numpy()})
    with _entered(path, overwrite) as work:
        if not work.finished(identity):
            if not overwrite:
                check_new_folder(work.out)
            save_params(arrays, table, work, files=files, shard_bytes=_WHOLE, stem="sae", identity=identity)


def _table(shapes: Mapping[str, tuple[int, ...]]) -> list[Leaf]:
    """Rows for the arrays of an SAE; the axis of latents is called so."""
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
    path: Path | WorkFolder,
    texts: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    *,
    write: Callable[[Path, Mapping[str, np.ndarray]], None] = write_tensors,
) -> None:
    """Makes a folder of texts and files of tensors; it appears under its name when it is complete.

    Args:
        path: a new folder, or the work folder of one.
        texts: texts by file name.
        tensors: tensors by file name, and by name within the file.
        write: writes the tensors of one file, as safetensors if not given.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    identity = _identity(texts, tensors)
    with _entered(path) as work:
        if work.finished(identity):
            return
        check_new_folder(work.out)
        work.prepare()
        try:
            with disk_errors(work.out):
                work.clear()
                for name, text in texts.items():
                    (work.path / name).write_text(text, encoding="utf-8")
                for name, arrays in tensors.items():
                    write(work.path / name, arrays)
            work.publish(identity)
        except OutputError:
            with contextlib.suppress(OSError):
                work.clear(recreate=False)
            raise


@contextlib.contextmanager
def _entered(path: Path | WorkFolder, overwrite: bool = False) -> Iterator[WorkFolder]:
    if isinstance(path, WorkFolder):
        yield path
    else:
        with WorkFolder(path, overwrite=overwrite) as work:
            yield work


def _identity(texts: Mapping[str, str], tensors: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """SHA-256 of all that a folder will hold."""
    total = hashlib.sha256(repr(sorted(texts.items())).encode())
    for file, arrays in tensors.items():
        for name, value in arrays.items():
            array = np.ascontiguousarray(value)
            total.update(repr((file, name, array.dtype.str, array.shape)).encode())
            total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def read_own(files: Found, mesh: Mesh | None = None) -> SAE:
    """Reads what `write_own` wrote.

    Args:
        files: the files.
        mesh: splits the latents over its axis `latents`, if it has one: each process reads what its devices
            hold. JAX's default device if None.

    Raises:
        CheckpointError: a file is missing, or says things that do not fit together.
        NonFiniteError: a tensor holds NaN or infinity.
        MeshError: another process failed.
    """
    told, cfg, file = files.told, files.settings, files.weights
    settings: dict[str, Any] = dict(told.values)
    if settings.pop("format", None) != FORMAT:
        raise CheckpointError(f"{cfg}: expected format {FORMAT!r}; it was written by something else")
    sizes = {name: settings.pop(name, None) for name in ("d_in", "d_out", "n_latents")}
    with faults_at_once(told) as told:
        settings |= {
            "k": None if settings.get("k") is None else told.whole("k"),
            "subtract_b_dec": told.flag("subtract_b_dec", False),
            "sites": told.whole("sites", 1),
            "metadata": told.mapping("metadata"),
        }
    tensors = open_safetensors(file).tensors
    known = [field for field in SAE.__dataclass_fields__ if field != "config"]
    unknown = [name for name in tensors if name not in known]
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    if unknown or missing:
        said = f"has no tensor {missing[0]!r}" if missing else f"has a tensor {unknown[0]!r} of no known use"
        raise CheckpointError(f"{file}: {said}; write the SAE again")
    for name, tensor in tensors.items():
        axes = 2 if name.startswith("W_") else 1
        if len(tensor.shape) != axes or not is_float(tensor.dtype):
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, where floats with {axes} "
                f"{'axes' if axes > 1 else 'axis'} were expected; write the SAE again"
            )
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: _AXES[name] for name in known},
        cfg,
        {name: (name, value) for name, value in sizes.items()},
    )
    split = "latents" if mesh is not None and "latents" in mesh.axis_names else None
    try:
        table = _table({name: tensor.shape for name, tensor in tensors.items()})
        arrays = load_params(tensors, table, str(file), mesh=mesh, rules={"latents": split})
        found = SAE(**arrays, config=SAEConfig(**settings)).checked()
    except (SAEError, TypeError) as error:
        raise CheckpointError(f"{files.folder}: {error}") from error
    for name, values in arrays.items():
        check_finite(file, name, values)
    mine = {"d_in": found.d_in, "d_out": found.d_out, "n_latents": found.n_latents}
    if sizes != mine:
        raise CheckpointError(f"{cfg}: says {sizes}, but the tensors have {mine}")
    return found


OWN = FileFormat(
    name="mergelab",
    read=read_own,
    signatures=(Signature(says={"format": FORMAT}),),
    weights=_WEIGHTS,
    settings=_CFG,
    looks_for="cfg.json of this library",
    write=write_own,
)
