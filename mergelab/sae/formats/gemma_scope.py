"""Gemma Scope: `params.npz` (JumpReLU), and version 2's `params.safetensors` with an affine skip path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.npz_file import NpzArray, open_npz
from mergelab.checkpoints.work_folder import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.formats.convert import arrays_of, refuse
from mergelab.sae.formats.own import write_folder

__all__ = ["read_gemma_scope", "read_gemma_scope_2", "write_gemma_scope"]

_NPZ = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read_gemma_scope(path: Path) -> Dictionary:
    """Reads `params.npz`: arrays only; nothing in it is unpickled.

    Raises:
        CheckpointError: not such a file.
    """
    file = path / "params.npz" if path.is_dir() else path
    stored = open_npz(file, _NPZ)
    _check_shapes(file, stored)  # before anything is inflated
    arrays = {name: jnp.asarray(array.read().astype(np.float32)) for name, array in stored.items()}
    return Dictionary(**arrays, config=DictionaryConfig("jump_relu")).checked()


def _check_shapes(file: Path, arrays: Mapping[str, NpzArray]) -> None:
    """Checks that arrays are floats, and fit together."""
    d, n = (*arrays["W_enc"].shape, 0, 0)[:2]
    out = arrays["W_dec"].shape[-1] if arrays["W_dec"].shape else 0
    wanted = {"W_enc": (d, n), "W_dec": (n, out), "b_enc": (n,), "b_dec": (out,), "threshold": (n,)}
    for name, shape in wanted.items():
        found = arrays[name]
        if found.dtype.kind != "f" or found.shape != shape:
            raise CheckpointError(
                f"{file}: {name} is {found.dtype.name} of shape {list(found.shape)}, but floats of shape "
                f"{list(shape)} were expected by W_enc of {list(arrays['W_enc'].shape)}; download it again"
            )


def read_gemma_scope_2(path: Path) -> Dictionary:
    """Reads version 2's `params.safetensors`.

    Raises:
        CheckpointError: not such a file.
    """
    file = path / "params.safetensors" if path.is_dir() else path
    wanted = {name: True for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}
    found = arrays_of(open_safetensors(file).tensors, {**wanted, "affine_skip_connection": False}, file)
    skip: Array | None = found.get("affine_skip_connection")
    return Dictionary(
        W_enc=found["w_enc"],
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_dec=found["b_dec"],
        threshold=found["threshold"],
        W_skip=skip,
        config=DictionaryConfig("jump_relu"),
    ).checked()


def write_gemma_scope(dictionary: Dictionary, path: Path | WorkFolder) -> None:
    """Writes a folder with `params.npz`.

    Raises:
        SAEError: the dictionary has no threshold, or something the format has no place for.
        OutputError: the folder is not empty, or cannot be written.
    """
    config = dictionary.config
    if config.activation not in ("jump_relu", "batch_topk"):
        raise refuse("gemma-scope", f"the activation {config.activation!r}", "'mergelab' or 'saelens'")
    if config.normalization != "none" or config.subtract_b_dec or dictionary.W_skip is not None:
        raise refuse("gemma-scope", "a normalisation, a subtracted b_dec or a skip path", "'mergelab'")
    arrays = dictionary.as_numpy()
    write_folder(path, {}, {"params.npz": {name: arrays[name] for name in _NPZ}}, write=_write_npz)


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))
