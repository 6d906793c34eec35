"""dictionary_learning: `ae.pt` and `config.json`, read and written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints import TensorSource
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import said_or, site_of, submodule_of
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import FormatSettings, faults_at_once, number_in
from mergelab.sae.formats.shared import (
    arrays_of,
    check_sizes,
    not_subtracting_b_dec,
    refuse,
    subtracting_b_dec,
    transposed,
)
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["DICTIONARY_LEARNING"]

_TOP_K, _BATCH, _NEW, _GATED = "AutoEncoderTopK", "BatchTopKSAE", "AutoEncoderNew", "GatedAutoEncoder"
_LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
_PLAIN = {**_LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}
_OURS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


@dataclass(frozen=True)
class _Kind:
    """A class of the library: our names of its tensors, our activation function, and use of `b_dec`."""

    names: Mapping[str, str]
    activation: str
    subtract_b_dec: bool = True


_KINDS: Mapping[str, _Kind] = {
    "AutoEncoder": _Kind({**_LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}, "relu"),
    _NEW: _Kind({**_LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"}, "relu", False),
    _GATED: _Kind(
        {
            **_LINEAR, "gate_bias": "b_enc", "r_mag": "magnitude_scale", "mag_bias": "magnitude_bias",
            "decoder_bias": "b_dec",
        },
        "gated",
    ),
    _TOP_K: _Kind(_PLAIN, "topk"),
    _BATCH: _Kind(_PLAIN, "batch_topk"),
    "MatryoshkaBatchTopKSAE": _Kind(_OURS, "batch_topk"),
    "JumpReluAutoEncoder": _Kind({**_OURS, "threshold": "threshold"}, "jump_relu", False),
}  # fmt: skip
_ALONE = {"AutoEncoder": "bias", _GATED: "gate_bias", "MatryoshkaBatchTopKSAE": "group_sizes"}
"""Tensors that only one class has, by which it is known where no `config.json` says the class."""

_AXES = {
    "W_enc": ("d", "n"), "W_dec": ("n", "d"), "b_enc": ("n",), "b_dec": ("d",), "threshold": ("n",),
    "magnitude_scale": ("n",), "magnitude_bias": ("n",),
}  # fmt: skip


def read_dictionary_learning(files: Found) -> SAE:
    """Reads a folder with `ae.pt` and `config.json`.

    Codes are those of `dictionary_learning.utils.load_dictionary`, which gives an `AutoEncoder` a decoder of
    norm 1.

    Raises:
        CheckpointError: a file is missing, or the class of the SAE is not supported.
    """
    file = files.weights
    tensors = open_weights(file).tensors
    values, trainer = _settings(files, tensors)
    with faults_at_once(trainer) as told:
        # Of an unknown class nothing else can be said.
        name = trainer.word("dict_class", _KINDS)
        kind, k = _KINDS[name], None
        if kind.activation in ("topk", "batch_topk"):
            in_file = "k" in tensors and name == _TOP_K
            k = _k_in(file, tensors["k"], told) if in_file else told.whole("k")
        if kind.activation == "batch_topk" and "threshold" not in tensors:
            told.refuse("has no threshold, which a batch-top-k SAE needs", file)
        check_sizes(
            file,
            {inner: tensor.shape for inner, tensor in tensors.items()},
            {
                inner: _AXES[ours] if inner == ours or "weight" not in inner else _AXES[ours][::-1]
                for inner, ours in kind.names.items()
            },
            files.settings,
            {
                "d": ("activation_dim", told.values.get("activation_dim")),
                "n": ("dict_size", told.values.get("dict_size")),
            },
        )
    raw = arrays_of(tensors, dict.fromkeys(kind.names, True), file)
    found = {ours: raw[inner].T if "weight" in inner else raw[inner] for inner, ours in kind.names.items()}
    if name == "AutoEncoder":
        norms = jnp.linalg.norm(found["W_dec"], axis=1)
        norms = jnp.where(norms > 0, norms, 1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norms[None, :], found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / norms[:, None]
    if kind.activation == "batch_topk":
        found["threshold"] = jnp.full_like(found["b_enc"], number_in(file, "threshold", tensors["threshold"]))
    config = SAEConfig(kind.activation, k, kind.subtract_b_dec, **_sites(values))
    return SAE(**found, config=config).checked()


def _settings(files: Found, tensors: Mapping[str, TensorSource]) -> tuple[Mapping[str, Any], FormatSettings]:
    """All that `config.json` says, and what it says of the trainer; the class alone where there is none."""
    if not files.settings.is_file():
        for name, tensor in _ALONE.items():
            if tensor in tensors:
                k = {"k": number_in(files.weights, "k", tensors["k"])} if "k" in tensors else {}
                return {}, FormatSettings(files.weights, {"dict_class": name, **k})
    told = files.told
    return told.values, told.inner("trainer")


def _k_in(path: Path, tensor: TensorSource, told: FormatSettings) -> int:
    k = number_in(path, "k", tensor)
    if k == int(k) and 1 <= k < 2**31:
        return int(k)
    told.refuse(f"k is {k}, but a whole number of at least 1 was expected", path)
    return 1


def _sites(config: Mapping[str, Any]) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata`: a trainer names a submodule, a buffer which end of it.

    `io: in_and_out` is how the library's buffer gives a training the input and the output of a submodule.
    """
    trainer, buffer = config.get("trainer"), config.get("buffer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    io = buffer.get("io") if isinstance(buffer, Mapping) else None
    name = trainer.get("submodule_name")
    site = site_of(name) if io != "in" else None
    keys = ("submodule_name", "layer", "lm_name")
    metadata = {key: trainer[key] for key in keys if isinstance(trainer.get(key), str | int)}
    if io == "in_and_out":
        writes = None if site is None else (site,)
        return {"writes": writes, "transcoder": True, "metadata": metadata}
    return {"reads": None if site is None else (site,), "transcoder": False, "metadata": metadata}


def write_dictionary_learning(sae: SAE, path: Path | WorkFolder) -> None:
    """Writes a folder for `dictionary_learning.utils.load_sae`.

    Raises:
        SAEError: the library has no class for the SAE.
        OutputError: the folder is taken, or cannot be written.
    """
    config = sae.config
    written = ("topk", "jump_relu", "batch_topk", "relu", "gated")
    if config.activation not in written:
        raise refuse("dictionary_learning", f"the activation {config.activation!r}", "'mergelab'")
    if not sae.is_autoencoder:
        raise refuse("dictionary_learning", f"a transcoder ({sae.mapping()})", "'mergelab'")
    if config.normalization != "none" or sae.W_skip is not None:
        raise refuse("dictionary_learning", "a normalization or a skip path", "'mergelab'")
    threshold = None if sae.threshold is None else np.asarray(sae.threshold)
    kind, extra = {"topk": _TOP_K, "relu": _NEW, "gated": _GATED}.get(config.activation, ""), {}
    if config.activation == "topk":
        extra = {"k": np.array(config.k, np.int64), "threshold": np.array(-1.0, np.float32)}
    elif (
        config.activation == "batch_topk"
        and config.k is not None
        and threshold is not None
        and (threshold == threshold[0]).all()
    ):
        kind, extra = _BATCH, {"k": np.array(config.k, np.int64), "threshold": np.array(threshold[0])}
    kind = kind or "JumpReluAutoEncoder"
    arrays = (subtracting_b_dec if _KINDS[kind].subtract_b_dec else not_subtracting_b_dec)(sae).as_numpy()
    tree = {
        inner: transposed(arrays[ours]) if "weight" in inner else arrays[ours]
        for inner, ours in _KINDS[kind].names.items()
    }
    tree |= extra
    trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.n_latents}
    trainer |= _named(config) | ({"k": config.k} if "k" in extra else {})
    cfg = json.dumps({"trainer": trainer}, indent=2) + "\n"
    write_folder(path, {"config.json": cfg}, {"ae.pt": tree}, write=write_pickled)


def _named(config: SAEConfig) -> dict[str, Any]:
    """`submodule_name`, `layer` and `lm_name`, as far as they are known."""
    site = None if config.reads is None else config.reads[0]
    name = said_or(config.metadata, "submodule_name", site, submodule_of(site))
    layer = site.split(".")[1] if site is not None and site.startswith("blocks.") else None
    found = {
        "submodule_name": name,
        "layer": config.metadata.get("layer") if layer is None else int(layer),
        "lm_name": config.metadata.get("lm_name", config.metadata.get("model")),
    }
    return {key: value for key, value in found.items() if value is not None}


DICTIONARY_LEARNING = FileFormat(
    name="dictionary_learning",
    read=read_dictionary_learning,
    signatures=(
        Signature(("encoder.weight", "decoder.weight"), ("trainer.dict_class",)),
        Signature(("W_enc", "W_dec"), ("trainer.dict_class",)),
        Signature(("bias", "encoder.weight", "encoder.bias", "decoder.weight")),
        Signature(("gate_bias", "mag_bias", "r_mag", "encoder.weight", "decoder.weight")),
        Signature(("group_sizes", "threshold", "k", "W_enc", "W_dec")),
    ),
    weights="ae.pt",
    settings="config.json",
    looks_for="ae.pt and config.json",
    write=write_dictionary_learning,
)
