"""Steering vectors as llama.cpp's control vectors: GGUF files with one direction for each layer.

llama.cpp adds `direction.N` to what block N (counted from 0) leaves in the residual stream, times a scale;
the first block cannot be steered (`common_control_vector_load`, `llama_adapter_cvec`). A vector is saved at
strength 1, so that the same scale gives the same text here and there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.gguf.architectures import ARCHITECTURES
from mergelab.checkpoints.gguf.header import Typed, header_bytes, read_header
from mergelab.checkpoints.gguf.model_file import stored_tensors
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, SiteError, quoted
from mergelab.interp.steering import SteeringVector
from mergelab.interp.vectors import with_strength

__all__ = ["load_steering", "save_steering"]

_ARCHITECTURE = "controlvector"
_F32 = 0
_SITE = re.compile(r"blocks\.([0-9]{1,6})\.resid_(pre|post)")
_DIRECTION = re.compile(r"direction\.([0-9]{1,6})")


@writes_anywhere("path")
def save_steering(
    vector: SteeringVector | Mapping[str, SteeringVector],
    path: str | Path,
    *,
    site: str | None = None,
    model_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a steering vector, or one for each of several sites, as a GGUF control vector.

    Args:
        vector: the vector; or vectors by site.
        path: the file, `NAME.gguf`; or a URL, such as `gs://bucket/NAME.gguf`.
        site: the site it steers, `blocks.N.resid_post`; the one that the vector names if None.
        model_type: family of the model; the one that the vector names if None.
        overwrite: replace the file if it is there.

    Returns:
        The file.

    Raises:
        SiteError: a site is not known, is not the residual stream after a block, or is that after the first.
        OutputError: the file is there, or cannot be written.
    """
    vectors = {site or vector.site: vector} if isinstance(vector, SteeringVector) else dict(vector)
    directions: dict[int, np.ndarray] = {}
    for name, one in vectors.items():
        direction = np.asarray(with_strength(one.vector, 1.0, one.norm), np.float32)
        if not np.isfinite(direction).all():
            raise SiteError(f"the vector of {name!r} has values that are not finite; make it again.")
        if directions and direction.shape != next(iter(directions.values())).shape:
            raise SiteError(f"the vector of {name!r} is {direction.size} wide, the others are not.")
        directions[_layer(name)] = direction
    if len(directions) != len(vectors) or not directions:
        raise SiteError(f"{len(vectors)} vectors are of {len(directions)} layers; give one for each layer.")
    kind = model_type or next((one.model_type for one in vectors.values() if one.model_type), "")
    metadata: dict[str, Any] = {
        "general.architecture": _ARCHITECTURE,
        f"{_ARCHITECTURE}.model_hint": _hint(kind),
        f"{_ARCHITECTURE}.layer_count": Typed("i", len(directions)),
    }
    listed = [(f"direction.{n}", d.shape, _F32, d.nbytes) for n, d in sorted(directions.items())]
    header, offsets = header_bytes(metadata, listed)
    content = bytearray(header)
    for offset, (_, direction) in zip(offsets, sorted(directions.items()), strict=True):
        content += bytes(offset - len(content)) + direction.tobytes()
    out = Path(path)
    if overwrite:
        return publish_file(out, bytes(content))
    with NewFiles([out]) as files:
        files.publish({out: bytes(content)})
        return files.paths[0]


def load_steering(path: str | Path) -> dict[str, SteeringVector]:
    """Reads a GGUF control vector, by whomever it was written.

    Args:
        path: the file, on this machine, on the hub (`org/name:NAME.gguf`) or at a URL.

    Returns:
        Vectors by site, `blocks.N.resid_post`; `edit(1.0)` adds one as it was saved.

    Raises:
        CheckpointError: the file is damaged, is no control vector, or has directions of different widths.
    """
    header = read_header(local_path(path))
    found = header.metadata.get("general.architecture")
    if found != _ARCHITECTURE:
        raise CheckpointError(
            f"{path} is a GGUF file of the architecture {quoted(found)}, not a control vector; name one that "
            "save_steering or llama.cpp's cvector-generator wrote"
        )
    kind = str(header.metadata.get(f"{_ARCHITECTURE}.model_hint") or "")
    tensors = {info.name: info for info in header.tensors}
    vectors: dict[int, SteeringVector] = {}
    for name, stored in stored_tensors(header).items():
        layer = _DIRECTION.fullmatch(name)
        if layer is None or len(tensors[name].shape) != 1 or int(layer[1]) == 0:
            raise CheckpointError(
                f"{path} has the tensor {quoted(name)} {list(tensors[name].shape)}, but a control vector has "
                "vectors direction.1, direction.2, ...; make it again"
            )
        direction = jnp.asarray(stored.read(0, stored.size).astype(np.float32))
        site = f"blocks.{int(layer[1])}.resid_post"
        length = jnp.linalg.norm(direction)
        vectors[int(layer[1])] = SteeringVector(direction, length, site, _model_type(kind))
    widths = {math.prod(info.shape) for info in tensors.values()}
    if len(widths) != 1:
        raise CheckpointError(f"{path} has directions of the widths {sorted(widths)}; make it again")
    return {vectors[layer].site: vectors[layer] for layer in sorted(vectors)}


def _layer(site: str) -> int:
    """The block after which llama.cpp adds what steers a site."""
    found = _SITE.fullmatch(site)
    layer = -1 if found is None else int(found[1]) - (found[2] == "pre")
    if found is None:
        what = f"is for the site {site!r}" if site else "does not say its site"
        raise SiteError(
            f"a steering vector {what}, but a control vector steers blocks.N.resid_post; pass site=, or "
            "steer that site."
        )
    if layer < 1:
        raise SiteError(
            f"the site {site!r} is before the second block's output, which no control vector can steer; "
            "choose blocks.1.resid_post or a later one."
        )
    return layer


def _hint(model_type: str) -> str:
    """llama.cpp's name of a family."""
    for name, choices in ARCHITECTURES.items():
        if any(choice.model_type == model_type for choice in choices):
            return name
    return model_type


def _model_type(hint: str) -> str:
    return ARCHITECTURES[hint][0].model_type if hint in ARCHITECTURES else hint
