"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` (`sparsify.SparseCoder.load_from_disk`)."""

from __future__ import annotations

import json
from pathlib import Path

from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.work_folder import WorkFolder
from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.formats.convert import arrays_of, refuse, subtracting_b_dec, transposed
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import Settings

__all__ = ["read_sparsify", "write_sparsify"]

_CFG, _WEIGHTS = "cfg.json", "sae.safetensors"


def read_sparsify(path: Path) -> Dictionary:
    """Reads a folder of sparsify.

    Raises:
        CheckpointError: a file is missing, or the activation is not top-k.
    """
    settings = Settings.read(path / _CFG)
    settings.word("activation", ("topk",), "topk")
    wanted = {"encoder.weight": True, "encoder.bias": True, "W_dec": True, "b_dec": True, "W_skip": False}
    found = arrays_of(open_safetensors(path / _WEIGHTS).tensors, wanted, path / _WEIGHTS)
    return Dictionary(
        W_enc=found["encoder.weight"].T,
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        config=DictionaryConfig(
            "topk", settings.whole("k", 32), subtract_b_dec=not settings.flag("transcode", False)
        ),
    ).checked()


def write_sparsify(dictionary: Dictionary, path: Path | WorkFolder) -> None:
    """Writes a folder for sparsify.

    Raises:
        SAEError: the dictionary is not a plain top-k one, or maps between different widths.
        OutputError: the folder is taken, or cannot be written.
    """
    config = dictionary.config
    if config.activation != "topk":
        raise refuse("sparsify", f"the activation {config.activation!r}", "'mergelab' or 'saelens'")
    if config.normalization != "none":
        raise refuse(
            "sparsify", f"normalization {config.normalization!r}", "'mergelab', 'saelens' or 'openai'"
        )
    if dictionary.d_in != dictionary.d_out:
        raise refuse("sparsify", f"widths {dictionary.d_in} and {dictionary.d_out}", "'mergelab'")
    skip = dictionary.W_skip is not None
    given = dictionary if skip else subtracting_b_dec(dictionary)
    arrays = given.as_numpy()
    tensors = {
        "encoder.weight": transposed(arrays["W_enc"]),
        "encoder.bias": arrays["b_enc"],
        "W_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    if skip:
        tensors["W_skip"] = transposed(arrays["W_skip"])
    cfg = {
        "activation": "topk",
        "expansion_factor": max(dictionary.n_latents // dictionary.d_in, 1),
        "normalize_decoder": True,
        "num_latents": dictionary.n_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": skip,
        "d_in": dictionary.d_in,
    }
    write_folder(path, {_CFG: json.dumps(cfg, indent=2) + "\n"}, {_WEIGHTS: tensors})
