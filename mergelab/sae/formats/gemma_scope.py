"""Gemma Scope: `params.npz` (JumpReLU), and version 2's `params.safetensors` with an affine skip path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from mergelab.checkpoints import TensorSource, is_float
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import hook_of, said_or, site_of
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.shared import arrays_of, check_sizes, refuse
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["GEMMA_SCOPE", "GEMMA_SCOPE_2"]

_NPZ = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_KINDS = {
    "resid": re.compile(r"gemma-scope.*-res(-|$)|^resid_post"),
    "mlp": re.compile(r"gemma-scope.*-mlp(-|$)|^mlp_out"),
    "att": re.compile(r"gemma-scope.*-att(-|$)|^attn_out"),
    "transcoder": re.compile(r"gemma-scope.*-transcoders?(-|$)|^transcoder"),
}
"""What the names of the releases' folders say an SAE is of."""
_WRITTEN = {"resid": "resid_post", "mlp": "mlp.out", "att": "attn.z", "transcoder": "mlp.out"}


def read_gemma_scope(files: Found) -> SAE:
    """Reads five arrays; nothing in them is unpickled.

    Raises:
        CheckpointError: not such a file.
    """
    file = files.weights
    tensors = open_weights(file).tensors
    missing = [name for name in _NPZ if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{file}: has no array {missing[0]!r}, only {', '.join(sorted(tensors)[:20]) or 'none'}; of "
            "another format?"
        )
    _check_shapes(file, tensors)  # before anything is inflated
    arrays = arrays_of(tensors, dict.fromkeys(_NPZ, True), file)
    if _of_embeddings(file):
        # Trained on embeddings before Gemma multiplies them by the root of their width; the site is after.
        scale = arrays["W_enc"].shape[0] ** 0.5
        arrays["W_enc"] = arrays["W_enc"] / scale
        arrays["W_dec"], arrays["b_dec"] = arrays["W_dec"] * scale, arrays["b_dec"] * scale
    return SAE(**arrays, config=SAEConfig("jump_relu", **_sites(file))).checked()


def _of_embeddings(file: Path) -> bool:
    parts = file.absolute().parent.parts[-6:]
    return "embedding" in parts and any("gemma-scope" in part for part in parts)


def _check_shapes(file: Path, arrays: Mapping[str, TensorSource]) -> None:
    """Checks that arrays are floats, and fit together."""
    d, n = (*arrays["W_enc"].shape, 0, 0)[:2]
    out = arrays["W_dec"].shape[-1] if arrays["W_dec"].shape else 0
    wanted = {"W_enc": (d, n), "W_dec": (n, out), "b_enc": (n,), "b_dec": (out,), "threshold": (n,)}
    for name, shape in wanted.items():
        found = arrays[name]
        if not is_float(found.dtype) or found.shape != shape:
            raise CheckpointError(
                f"{file}: {name} is {found.dtype.name} of shape {list(found.shape)}, but floats of shape "
                f"{list(shape)} were expected by W_enc of {list(arrays['W_enc'].shape)}; download it again"
            )


def read_gemma_scope_2(files: Found) -> SAE:
    """Reads version 2's `params.safetensors`.

    Raises:
        CheckpointError: not such a file.
    """
    file = files.weights
    wanted = {name: True for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}
    tensors = open_weights(file).tensors
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        {
            "w_enc": ("d_in", "n"), "w_dec": ("n", "d_out"), "b_enc": ("n",), "b_dec": ("d_out",),
            "threshold": ("n",), "affine_skip_connection": ("d_in", "d_out"),
        },
    )  # fmt: skip
    found = arrays_of(tensors, {**wanted, "affine_skip_connection": False}, file)
    skip: Array | None = found.get("affine_skip_connection")
    return SAE(
        W_enc=found["w_enc"],
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_dec=found["b_dec"],
        threshold=found["threshold"],
        W_skip=skip,
        config=SAEConfig("jump_relu", **_sites(file)),
    ).checked()


def _sites(file: Path) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata`.

    `config.json` beside the file says them: version 2 under `hf_hook_point_in` and `_out`, files of this
    library as hooks of TransformerLens. Where there is none, the names of the release's folders do
    (`gemma-scope-2b-pt-mlp/layer_3/...`), which for a transcoder tell what is written alone.
    """
    beside = file.with_name("config.json")
    said = read_json_object(beside) if beside.is_file() else {}
    keys = ("hook_name", "hook_name_out", "hf_hook_point_in", "hf_hook_point_out", "model_name")
    metadata = {key: said[key] for key in keys if isinstance(said.get(key), str)}
    hook = metadata.get("hook_name", metadata.get("hf_hook_point_in"))
    target = metadata.get("hook_name_out", metadata.get("hf_hook_point_out"))
    parts = file.absolute().parent.parts[-6:]
    layers = [found[1] for part in parts if (found := re.search(r"layer_(\d{1,4})(?!\d)", part))]
    released = any("gemma-scope" in part for part in parts)
    kinds = [kind for part in parts for kind, words in _KINDS.items() if released and words.search(part)]
    transcoder: bool | None = None
    if hook is not None and target is not None:
        transcoder = hook != target
    elif kinds:
        transcoder = kinds[-1] == "transcoder"
        named = f"blocks.{int(layers[-1])}.{_WRITTEN[kinds[-1]]}" if layers else None
        if _of_embeddings(file):
            named = "embed"
        if transcoder and layers and any("gemma-scope-2-" in part for part in parts):
            hook = hook or f"blocks.{int(layers[-1])}.mlp.input"
        hook, target = (hook, target or named) if transcoder else (hook or named, None)
    reads, writes = site_of(hook), site_of(target)
    if reads is not None and writes is not None:
        transcoder = None
    return {
        "reads": None if reads is None else (reads,),
        "writes": None if writes is None else (writes,),
        "transcoder": transcoder,
        "metadata": metadata,
    }


def write_gemma_scope(sae: SAE, path: Path | WorkFolder) -> None:
    """Writes a folder with `params.npz`.

    Raises:
        SAEError: the SAE has no threshold, or something the format has no place for.
        OutputError: the folder is not empty, or cannot be written.
    """
    config = sae.config
    if config.activation not in ("jump_relu", "batch_topk"):
        raise refuse("gemma-scope", f"the activation {config.activation!r}", "'mergelab' or 'saelens'")
    if config.normalization != "none" or config.subtract_b_dec or sae.W_skip is not None:
        raise refuse("gemma-scope", "a normalization, a subtracted b_dec or a skip path", "'mergelab'")
    said = _hooks(sae)
    if not sae.is_autoencoder and "hook_name_out" not in said:
        raise refuse("gemma-scope", "a transcoder whose sites are not known", "'mergelab' or 'saelens'")
    cfg = json.dumps({"architecture": "jump_relu", **said}, indent=2) + "\n"
    arrays = sae.as_numpy()
    write_folder(
        path,
        {"config.json": cfg} if said else {},
        {"params.npz": {name: arrays[name] for name in _NPZ}},
        write=_write_npz,
    )


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        named: dict[str, Any] = dict(arrays)  # `allow_pickle` would be one of them before numpy 2.2
        np.savez(file, **named)


def _hooks(sae: SAE) -> dict[str, str]:
    """`hook_name` and, always beside it, `hook_name_out`, in TransformerLens' names; nothing if one has none.

    A hook that is not a site here is the one the SAE was read with.
    """
    config = sae.config
    found: dict[str, str] = {}
    for key, sites in (("hook_name", config.reads), ("hook_name_out", config.writes)):
        site = None if sites is None else sites[0]
        said = said_or(config.metadata, key, site, hook_of(site) or site)
        if said is not None:
            found[key] = said
    if sae.is_autoencoder and "hook_name" in found:
        return {"hook_name": found["hook_name"], "hook_name_out": found["hook_name"]}
    if not sae.is_autoencoder and "hook_name_out" in found:
        return {"hook_name": "unknown", **found}
    return {}


GEMMA_SCOPE = FileFormat(
    name="gemma-scope",
    read=read_gemma_scope,
    signatures=(Signature(_NPZ),),
    weights="params.npz",
    settings=None,
    looks_for="params.npz",
    write=write_gemma_scope,
)
GEMMA_SCOPE_2 = FileFormat(
    name="gemma-scope-2",
    read=read_gemma_scope_2,
    signatures=(Signature(("w_enc", "w_dec", "b_enc", "b_dec", "threshold")),),
    weights="params.safetensors",
    settings=None,
    looks_for="params.safetensors",
)
