"""dictionary_learning: `ae.pt` and `config.json`, read and written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource, open_pickled
from mergelab.checkpoints.pickle_writer import write_pickled
from mergelab.checkpoints.work_folder import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.formats.convert import arrays_of, refuse, subtracting_b_dec, transposed
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import Settings, number_in

__all__ = ["read_dictionary_learning", "write_dictionary_learning"]

_TOP_K = "AutoEncoderTopK"
_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def read_dictionary_learning(path: Path) -> Dictionary:
    """Reads a folder with `ae.pt` and `config.json`.

    Raises:
        CheckpointError: a file is missing, or the class of the dictionary is not supported.
    """
    trainer = Settings.read(path / "config.json").inner("trainer")
    kind = trainer.values.get("dict_class")
    tensors = open_pickled(path / "ae.pt").tensors
    if kind == "JumpReluAutoEncoder":
        wanted = {"W_enc": True, "W_dec": True, "b_enc": True, "b_dec": True, "threshold": True}
        found = arrays_of(tensors, wanted, path / "ae.pt")
        return Dictionary(**found, config=DictionaryConfig("jump_relu")).checked()
    if not isinstance(kind, str) or kind not in (_TOP_K, *_BATCH):
        raise CheckpointError(
            f"{path / 'config.json'}: trainer.dict_class {kind!r} is not supported; "
            f"{_TOP_K}, {', '.join(_BATCH)} and JumpReluAutoEncoder are"
        )
    if kind == "MatryoshkaBatchTopKSAE":
        wanted = {"W_enc": True, "W_dec": True, "b_enc": True, "b_dec": True}
        found = arrays_of(tensors, wanted, path / "ae.pt")
    else:
        wanted = {"encoder.weight": True, "encoder.bias": True, "decoder.weight": True, "b_dec": True}
        raw = arrays_of(tensors, wanted, path / "ae.pt")
        found = {
            "W_enc": raw["encoder.weight"].T,
            "b_enc": raw["encoder.bias"],
            "W_dec": raw["decoder.weight"].T,
            "b_dec": raw["b_dec"],
        }
    n = found["b_enc"].shape[0]
    if kind == _TOP_K:
        k = _k_in(path / "ae.pt", tensors["k"]) if "k" in tensors else trainer.whole("k")
        return Dictionary(**found, config=DictionaryConfig("topk", k, subtract_b_dec=True)).checked()
    if "threshold" not in tensors:
        raise CheckpointError(f"{path / 'ae.pt'}: has no threshold, which a batch-top-k dictionary needs")
    threshold = np.full(n, number_in(path / "ae.pt", "threshold", tensors["threshold"]), np.float32)
    settings = DictionaryConfig("batch_topk", trainer.whole("k"), subtract_b_dec=True)
    return Dictionary(**found, threshold=found["b_enc"] * 0 + threshold, config=settings).checked()


def _k_in(path: Path, tensor: TensorSource) -> int:
    k = number_in(path, "k", tensor)
    if k != int(k) or not 1 <= k < 2**31:
        raise CheckpointError(
            f"{path}: k is {k}, but a whole number of at least 1 was expected; get it again"
        )
    return int(k)


def write_dictionary_learning(dictionary: Dictionary, path: Path | WorkFolder) -> None:
    """Writes a folder for `dictionary_learning.utils.load_dictionary`.

    Raises:
        SAEError: the library has no class for the dictionary.
        OutputError: the folder is taken, or cannot be written.
    """
    config = dictionary.config
    if config.activation not in ("topk", "jump_relu", "batch_topk"):
        raise refuse(
            "dictionary_learning", f"the activation {config.activation!r}", "'mergelab' or 'saelens'"
        )
    if config.normalization != "none" or dictionary.W_skip is not None or dictionary.d_in != dictionary.d_out:
        raise refuse("dictionary_learning", "a normalisation, a skip path or two widths", "'mergelab'")
    trainer: dict[str, Any] = {"activation_dim": dictionary.d_in, "dict_size": dictionary.n_latents}
    if config.activation == "topk":
        arrays = subtracting_b_dec(dictionary).as_numpy()
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
        tree = dictionary.as_numpy()
    cfg = json.dumps({"trainer": trainer}, indent=2) + "\n"
    write_folder(path, {"config.json": cfg}, {"ae.pt": tree}, write=write_pickled)
