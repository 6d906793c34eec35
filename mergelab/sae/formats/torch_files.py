"""Published SAEs that are one torch file: Qwen-Scope, Goodfire, qresearch's and Kissane's.

Each is told by its tensors: `W_enc [n, d]` beside `W_dec [d, n]` (Qwen-Scope, top-k, whose k is in the name
of its repository, `...-L0_50`); `W_enc [d, n]` beside `NAME_cfg.json` (Kissane's, of all heads side by side);
`encoder_linear.weight` (Goodfire) and `encoder.weight` with `decoder.bias` (qresearch), both ReLU. Nothing is
unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jax import Array

from mergelab.checkpoints import TensorSource
from mergelab.checkpoints.json_data import read_optional_json
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Files, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.shared import arrays_of, check_sizes
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["TORCH_RELEASE"]

_LINEAR = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
_PLAIN = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_NAMED = ("W_enc", "b_enc", "W_dec", "b_dec")
_LAYER = re.compile(r"(?:layer_?|(?<![A-Za-z])[lL])(\d{1,4})(?!\d)")
_K = re.compile(r"L0_(\d{1,6})(?!\d)")


class _TorchRelease(FileFormat):
    """The format, which names of tensors alone do not tell from circuit-tracer's."""

    def find(self, files: Files, reserved: Collection[str] = ()) -> Found | None:
        found = super().find(files, reserved)
        if found is None:
            return None
        tensors = open_weights(found.weights).tensors
        if not set(_NAMED) <= tensors.keys() or _beside(found.weights).is_file():
            return found
        (n,) = tensors["b_enc"].shape or (0,)
        latents_first = (tensors["W_enc"].shape[:1] == (n,), tensors["W_dec"].shape[:1] == (n,))
        # Kissane's, whose settings are missing: reading it says so.
        lone = latents_first == (False, True) and found.weights.suffix == ".pt"
        return found if latents_first == (True, False) or lone else None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")


def read_torch_release(files: Found) -> SAE:
    """Reads the file.

    Raises:
        CheckpointError: its tensors are not those of a known release, do not fit together, or k is not known.
    """
    path = files.weights
    tensors = open_weights(path).tensors
    for names in (_LINEAR, _PLAIN):
        if set(names) <= tensors.keys():
            found = _read(path, tensors, names, (("n", "d"), ("n",), ("d", "n"), ("d",)))
            return _sae(path, found, "relu")
    if not set(_NAMED) <= tensors.keys():
        known = ", ".join(sorted(tensors)[:20])
        raise CheckpointError(f"{path}: holds {known}, the tensors of no SAE that is known; name its format")
    beside = _beside(path)
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


TORCH_RELEASE = _TorchRelease(
    name="torch-release",
    read=read_torch_release,
    signatures=(
        Signature(_LINEAR),
        Signature(_PLAIN, without=("threshold", "log_jumprelu_threshold")),
        Signature(_NAMED, without=("threshold", "activation_function.threshold")),
    ),
    weights="layer0.sae.pt",
    settings=None,
    looks_for="one .pt or .pth file of Qwen-Scope, Goodfire, qresearch or Kissane",
)
