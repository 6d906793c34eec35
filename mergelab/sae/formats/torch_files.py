"""Published SAEs that are one torch file: Qwen-Scope, Goodfire, qresearch's and Kissane's.

Each is told by its tensors: `W_enc [n, d]` beside `W_dec [d, n]` (Qwen-Scope, top-k, whose k is in the name
of its repository, `...-L0_50`); `W_enc [d, n]` beside `NAME_cfg.json` (Kissane's, of all heads side by side);
`encoder_linear.weight` (Goodfire) and `encoder.weight` with `decoder.bias` (qresearch), both ReLU. Nothing is
unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jax import Array

from mergelab.checkpoints import TensorSource, open_pickled
from mergelab.checkpoints.json_data import read_optional_json
from mergelab.errors import CheckpointError
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.shared import arrays_of, check_sizes
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["is_torch_release", "read_torch_release"]

_LINEAR = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
_PLAIN = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_NAMED = ("W_enc", "b_enc", "W_dec", "b_dec")
_LAYER = re.compile(r"(?:layer_?|(?<![A-Za-z])[lL])(\d{1,4})(?!\d)")
_K = re.compile(r"L0_(\d{1,6})(?!\d)")


def is_torch_release(path: Path) -> bool:
    """Whether a torch file holds the tensors of one of them."""
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return False
    names = open_pickled(path, values=True).tensors.keys()
    return any(set(kind) <= names for kind in (_LINEAR, _PLAIN, _NAMED))


def read_torch_release(path: Path) -> SAE:
    """Reads the file.

    Raises:
        CheckpointError: its tensors are not those of a known release, do not fit together, or k is not known.
    """
    tensors = open_pickled(path, values=True).tensors
    for names in (_LINEAR, _PLAIN):
        if set(names) <= tensors.keys():
            found = _read(path, tensors, names, (("n", "d"), ("n",), ("d", "n"), ("d",)))
            return _sae(path, found, "relu")
    if not set(_NAMED) <= tensors.keys():
        known = ", ".join(sorted(tensors)[:20])
        raise CheckpointError(f"{path}: holds {known}, the tensors of no SAE that is known; name its format")
    beside = path.with_name(f"{path.stem}_cfg.json")
    rows_are_latents = tensors["W_enc"].shape[:1] == tensors["b_enc"].shape
    if rows_are_latents and not beside.is_file():
        found = _read(path, tensors, _NAMED, (("n", "d"), ("n",), ("d", "n"), ("d",)))
        return _sae(path, found, "topk", _k(path))
    cfg = read_optional_json(beside)
    hook = cfg.get("act_name")
    if not isinstance(hook, str):
        raise CheckpointError(
            f"{path}: W_enc has shape {list(tensors['W_enc'].shape)}, which is that of an SAE with "
            f"{beside.name} beside it, but that file is missing or names no act_name; get it too"
        )
    found = _read(path, tensors, _NAMED, (("d", "n"), ("n",), ("n", "d"), ("d",)))
    site = site_of(hook)
    config = SAEConfig(
        "relu",
        subtract_b_dec=True,
        reads=None if site is None else (site,),
        transcoder=False,
        metadata={"hook_name": hook},
    )
    return SAE(*(found[name] for name in _NAMED[:4]), config=config).checked()


def _read(
    path: Path,
    tensors: Mapping[str, TensorSource],
    names: tuple[str, ...],
    axes: tuple[tuple[str, ...], ...],
) -> dict[str, Array]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_sizes(path, shapes, dict(zip(names, axes, strict=True)))
    return arrays_of(tensors, dict.fromkeys(names, True), path)


def _sae(path: Path, found: Mapping[str, Array], activation: str, k: int | None = None) -> SAE:
    """The SAE of arrays in the order encoder, its bias, decoder, its bias, as torch keeps them."""
    W_enc, b_enc, W_dec, b_dec = found.values()
    layer = _LAYER.search(path.name)
    site = None if layer is None else f"blocks.{int(layer[1])}.resid_post"
    config = SAEConfig(activation, k, reads=None if site is None else (site,), transcoder=False)
    return SAE(W_enc.T, b_enc, W_dec.T, b_dec, config).checked()


def _k(path: Path) -> int:
    for part in reversed(path.absolute().parts):
        if match := _K.search(part):
            return int(match[1])
    raise CheckpointError(
        f"{path}: holds the tensors of Qwen-Scope, which keeps k in the name of its repository, and no "
        "folder above it is called ...-L0_50; put it into a folder of the repository's name, such as "
        "SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    )
