"""SAELens: `cfg.json` and `sae_weights.safetensors` (`sae_lens.SAE.load_from_disk`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints import open_safetensors
from mergelab.checkpoints.work_folder import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.formats.convert import arrays_of, refuse
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import Settings

__all__ = ["WEIGHTS", "read_saelens", "write_saelens"]

WEIGHTS = "sae_weights.safetensors"

_ACTIVATIONS = {
    "standard": "relu", "gated": "gated", "topk": "topk", "jumprelu": "jump_relu",
    "transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jump_relu",
}  # fmt: skip
_NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm"}


def read_saelens(path: Path) -> Dictionary:
    """Reads a folder of SAELens.

    Raises:
        CheckpointError: a file is missing, or of an architecture or normalisation that is not supported.
    """
    settings = Settings.read(path / "cfg.json")
    cfg: dict[str, Any] = dict(settings.values)
    architecture = settings.word("architecture", _ACTIVATIONS, "standard")
    normalization = cfg.get("normalize_activations", "none")
    if not isinstance(normalization, str) or normalization not in _NORMALIZATIONS:
        raise CheckpointError(
            f"{path / 'cfg.json'}: normalize_activations {normalization!r} needs data not in the file; "
            "fold it in SAELens first (fold_activation_norm_scaling_factor)"
        )
    gated = architecture == "gated"
    wanted = {"W_enc": True, "W_dec": True, "b_dec": True, "b_enc": not gated}
    wanted |= {name: gated for name in ("b_gate", "r_mag", "b_mag")}
    wanted |= {"threshold": _ACTIVATIONS[architecture] == "jump_relu", "W_skip": False}
    found = arrays_of(open_safetensors(path / WEIGHTS).tensors, wanted, path / WEIGHTS)
    config = DictionaryConfig(
        activation=_ACTIVATIONS[architecture],
        k=settings.whole("k") if architecture == "topk" else None,
        subtract_b_dec=settings.flag("apply_b_dec_to_input", True) and "transcoder" not in architecture,
        normalization=_NORMALIZATIONS[normalization],
        metadata=settings.mapping("metadata"),
    )
    if settings.flag("rescale_acts_by_decoder_norm", False) and architecture == "topk":
        # Codes count in units of the decoder's norms: the same as a decoder of norm 1.
        norms = jnp.linalg.norm(found["W_dec"], axis=1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norms[None, :], found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / norms[:, None]
    return Dictionary(
        W_enc=found["W_enc"],
        b_enc=found["b_gate"] if gated else found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        config=config,
        threshold=found.get("threshold"),
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        magnitude_scale=found.get("r_mag"),
        magnitude_bias=found.get("b_mag"),
    ).checked()


def write_saelens(dictionary: Dictionary, path: Path | WorkFolder) -> None:
    """Writes a folder for SAELens; a batch-top-k dictionary becomes `jumprelu`, as SAELens itself saves them.

    Raises:
        SAEError: SAELens has no architecture for the dictionary.
        OutputError: the folder is taken, or cannot be written.
    """
    config = dictionary.config
    activation = "jump_relu" if config.activation == "batch_topk" else config.activation
    # An autoencoder that subtracts nothing has two widths alike and no skip path.
    maps = dictionary.d_in != dictionary.d_out or dictionary.W_skip is not None
    names = {"relu": "standard", "gated": "gated", "topk": "topk", "jump_relu": "jumprelu"}
    architecture = names[activation]
    if maps:
        if activation not in ("relu", "jump_relu") or (
            dictionary.W_skip is not None and activation != "relu"
        ):
            raise refuse("saelens", f"a {config.activation} transcoder", "'mergelab' or 'sparsify'")
        skip = dictionary.W_skip is not None
        architecture = (
            "skip_transcoder" if skip else {"relu": "transcoder"}.get(activation, "jumprelu_transcoder")
        )
    arrays = dictionary.as_numpy()
    if activation == "gated":
        renamed = {"b_enc": "b_gate", "magnitude_scale": "r_mag", "magnitude_bias": "b_mag"}
        arrays = {renamed.get(name, name): value for name, value in arrays.items()}
    if "W_skip" in arrays:
        arrays["W_skip"] = np.ascontiguousarray(arrays["W_skip"].T)
    known = {key: value for key, value in config.metadata.items() if isinstance(value, str | int | float)}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": config.normalization,
        "reshape_activations": "none",
        "metadata": known,
    }
    if maps:
        cfg["d_out"] = dictionary.d_out
    if activation == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    write_folder(path, {"cfg.json": json.dumps(cfg, indent=2) + "\n"}, {WEIGHTS: arrays})
