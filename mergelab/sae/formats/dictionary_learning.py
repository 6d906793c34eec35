"""dictionary_learning: `ae.pt` and `config.json`, read and written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import said_or, site_of, submodule_of
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import number_in
from mergelab.sae.formats.shared import arrays_of, check_sizes, refuse, subtracting_b_dec, transposed
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["DICTIONARY_LEARNING"]

_TOP_K = "AutoEncoderTopK"
_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_AXES = {
    "W_enc": ("d", "n"), "W_dec": ("n", "d"), "b_enc": ("n",), "b_dec": ("d",), "encoder.weight": ("n", "d"),
    "encoder.bias": ("n",), "decoder.weight": ("d", "n"),
}  # fmt: skip


def read_dictionary_learning(files: Found) -> SAE:
    """Reads a folder with `ae.pt` and `config.json`.

    Raises:
        CheckpointError: a file is missing, or the class of the SAE is not supported.
    """
    config, file, settings_file = files.told, files.weights, files.settings
    trainer = config.inner("trainer")
    kind = trainer.values.get("dict_class")
    tensors = open_weights(file).tensors
    told = _sites(config.values)
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: _AXES[name] for name in tensors if name in _AXES},
        settings_file,
        {
            "d": ("activation_dim", trainer.values.get("activation_dim")),
            "n": ("dict_size", trainer.values.get("dict_size")),
        },
    )
    if kind == "JumpReluAutoEncoder":
        wanted = {"W_enc": True, "W_dec": True, "b_enc": True, "b_dec": True, "threshold": True}
        found = arrays_of(tensors, wanted, file)
        return SAE(**found, config=SAEConfig("jump_relu", **told)).checked()
    if not isinstance(kind, str) or kind not in (_TOP_K, *_BATCH):
        raise CheckpointError(
            f"{settings_file}: trainer.dict_class {kind!r} is not supported; "
            f"{_TOP_K}, {', '.join(_BATCH)} and JumpReluAutoEncoder are"
        )
    if kind == "MatryoshkaBatchTopKSAE":
        wanted = {"W_enc": True, "W_dec": True, "b_enc": True, "b_dec": True}
        found = arrays_of(tensors, wanted, file)
    else:
        wanted = {"encoder.weight": True, "encoder.bias": True, "decoder.weight": True, "b_dec": True}
        raw = arrays_of(tensors, wanted, file)
        found = {
            "W_enc": raw["encoder.weight"].T,
            "b_enc": raw["encoder.bias"],
            "W_dec": raw["decoder.weight"].T,
            "b_dec": raw["b_dec"],
        }
    n = found["b_enc"].shape[0]
    if kind == _TOP_K:
        k = _k_in(file, tensors["k"]) if "k" in tensors else trainer.whole("k")
        return SAE(**found, config=SAEConfig("topk", k, subtract_b_dec=True, **told)).checked()
    if "threshold" not in tensors:
        raise CheckpointError(f"{file}: has no threshold, which a batch-top-k SAE needs")
    threshold = np.full(n, number_in(file, "threshold", tensors["threshold"]), np.float32)
    settings = SAEConfig("batch_topk", trainer.whole("k"), subtract_b_dec=True, **told)
    return SAE(**found, threshold=found["b_enc"] * 0 + threshold, config=settings).checked()


def _k_in(path: Path, tensor: TensorSource) -> int:
    k = number_in(path, "k", tensor)
    if k != int(k) or not 1 <= k < 2**31:
        raise CheckpointError(
            f"{path}: k is {k}, but a whole number of at least 1 was expected; get it again"
        )
    return int(k)


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
    if config.activation not in ("topk", "jump_relu", "batch_topk"):
        raise refuse(
            "dictionary_learning", f"the activation {config.activation!r}", "'mergelab' or 'saelens'"
        )
    if not sae.is_autoencoder:
        raise refuse("dictionary_learning", f"a transcoder ({sae.mapping()})", "'mergelab'")
    if config.normalization != "none" or sae.W_skip is not None:
        raise refuse("dictionary_learning", "a normalization or a skip path", "'mergelab'")
    trainer: dict[str, Any] = {"activation_dim": sae.d_in, "dict_size": sae.n_latents}
    trainer |= _named(config)
    if config.activation == "topk":
        arrays = subtracting_b_dec(sae).as_numpy()
        trainer |= {"dict_class": _TOP_K, "k": config.k}
        tree: dict[str, Any] = {
            "b_dec": arrays["b_dec"],
            "k": np.array(config.k, np.int64),
            "threshold": np.array(-1.0, np.float32),
            "decoder.weight": transposed(arrays["W_dec"]),
            "encoder.weight": transposed(arrays["W_enc"]),
            "encoder.bias": arrays["b_enc"],
        }
    else:
        if config.subtract_b_dec:
            raise refuse("dictionary_learning", "a threshold on inputs less b_dec", "'mergelab' or 'saelens'")
        trainer |= {"dict_class": "JumpReluAutoEncoder"}
        tree = sae.as_numpy()
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
    signatures=(Signature(settings=("trainer.dict_class",)),),
    weights="ae.pt",
    settings="config.json",
    looks_for="ae.pt and config.json",
    write=write_dictionary_learning,
)
