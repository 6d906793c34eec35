"""SAELens: `cfg.json` and `sae_weights.safetensors` (`sae_lens.SAE.load_from_disk`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, WeightsFile, open_weights
from mergelab.sae.formats.hook_names import hook_of, said_or
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.saelens_settings import OF_THE_MODEL, SaeLensSettings, read_settings
from mergelab.sae.formats.settings import FormatSettings, number_in
from mergelab.sae.formats.shared import (
    arrays_of,
    check_sizes,
    fold_norm_scaling,
    fold_whitening,
    not_subtracting_b_dec,
    refuse,
)
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["SAELENS"]

_WEIGHTS = "sae_weights.safetensors"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""What a training keeps beside a checkpoint: the factor or the matrices that a finished SAE has folded in."""


def read_saelens(files: Found) -> SAE:
    """Reads a folder of SAELens, of version 3 to 6.

    Codes and reconstructions are those of SAELens. Where codes count in units of the decoder's norms
    (`rescale_acts_by_decoder_norm`) the decoder becomes one of norm 1, and what a finetuning multiplied
    codes by (`scaling_factor`, before version 6) goes into the decoder: both compute the same.

    Raises:
        CheckpointError: a file is missing, or of an architecture or normalization that is not supported.
    """
    told, file = files.told, files.weights
    cfg = read_settings(told)
    opened = open_weights(file)
    found = _arrays(opened, cfg, files)
    if cfg.rescale:
        norms = jnp.linalg.norm(found["W_dec"], axis=1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norms[None, :], found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / jnp.where(norms > 0, norms, 1)[:, None]
    factor = _finetuned(told, opened, files, found["W_dec"].shape[0])
    if factor is not None:
        found["W_dec"] = found["W_dec"] * factor[:, None]
    gated = cfg.activation == "gated"
    folded = cfg.normalization in ("expected_average", "whitening")
    sae = SAE(
        W_enc=found["W_enc"],
        b_enc=found["b_gate"] if gated else found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        config=SAEConfig(
            cfg.activation,
            cfg.k,
            cfg.subtract_b_dec,
            normalization="none" if folded else cfg.normalization,
            **cfg.sites,
        ),
        threshold=found.get("threshold"),
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        magnitude_scale=found.get("r_mag"),
        magnitude_bias=found.get("b_mag"),
    ).checked()
    if cfg.maps and sae.is_autoencoder and cfg.normalization != "none":
        raise CheckpointError(
            f"{files.settings}: a normalization of a transcoder from a hook to itself is not supported; "
            "correct its hook_name or hook_name_out"
        )
    return _folded(sae, cfg, files) if folded else sae


def _arrays(opened: WeightsFile, cfg: SaeLensSettings, files: Found) -> dict[str, Array]:
    """The tensors of an architecture, in float32, and a threshold for each latent."""
    tensors, file = opened.tensors, files.weights
    gated, jumps = cfg.activation == "gated", cfg.activation == "jump_relu"
    logarithm = jumps and "threshold" not in tensors and "log_threshold" in tensors  # of early trainings
    wanted = {"W_enc": True, "W_dec": True, "b_dec": True, "b_enc": not gated}
    wanted |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), True) if gated else {}
    wanted |= {"log_threshold" if logarithm else "threshold": True} if jumps else {}
    wanted |= {"W_skip": True} if cfg.skip else {}
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        _axes("d_out" if cfg.maps else "d_in"),
        files.settings,
        {name: (name, value) for name, value in cfg.sizes.items()},
    )
    found = arrays_of(tensors, wanted, file)
    if logarithm:
        found["threshold"] = jnp.exp(found.pop("log_threshold"))
    if cfg.trains:
        if "topk_threshold" not in tensors:
            raise CheckpointError(f"{file}: has no topk_threshold, which a {cfg.architecture} training keeps")
        threshold = number_in(file, "topk_threshold", tensors["topk_threshold"])
        found["threshold"] = jnp.full_like(found["b_enc"], threshold)
    return found


def _axes(out: str) -> dict[str, tuple[str, ...]]:
    latents = ("b_enc", "b_gate", "r_mag", "b_mag", "threshold", "log_threshold", *_FACTORS)
    both = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", out), "b_dec": (out,), "W_skip": (out, "d_in")}
    return both | {name: ("d_sae",) for name in latents}


_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def _finetuned(told: FormatSettings, opened: WeightsFile, files: Found, n: int) -> Array | None:
    """What a finetuning multiplies codes by before they are decoded, `[n]`; None if nothing does.

    Files of some versions have factors of 1, whatever their settings say.
    """
    name = next((name for name in _FACTORS if name in opened.tensors), None)
    used = told.flag("finetuning_scaling_factor", False)
    if name is None:
        return None
    factor = arrays_of(opened.tensors, {name: True}, files.weights)[name]
    if bool(jnp.allclose(factor, 1)):
        return None
    if not used:
        raise CheckpointError(
            f"{files.weights}: {name} has values other than 1, but finetuning_scaling_factor of "
            f"{files.settings} is not true; set it to what the SAE was trained with"
        )
    return factor


def _folded(sae: SAE, cfg: SaeLensSettings, files: Found) -> SAE:
    """The SAE for raw activations: what trainings scale or whiten activations by goes into its weights."""
    if cfg.normalization == "whitening":
        beside = files.folder / _WHITENING
        if not beside.is_file():
            raise CheckpointError(
                f"{files.settings}: normalize_activations 'covariance_whitening' needs matrices that stand "
                f"in {_WHITENING} beside the weights, which is not there; get that file too, or fold them in "
                "SAELens (fold_activation_whitening)"
            )
        names = ("mean", "matrix", "inverse_matrix")
        tensors = arrays_of(open_weights(beside).tensors, dict.fromkeys(names, True), beside)
        d = sae.d_in
        check_sizes(
            beside,
            {name: value.shape for name, value in tensors.items()} | {"W_enc": sae.W_enc.shape},
            {"mean": ("d_in",), "matrix": ("d_in", "d_in"), "inverse_matrix": ("d_in", "d_in")},
            files.settings,
            {"d_in": ("d_in", d)},
        )
        return fold_whitening(sae, *(tensors[name] for name in names))
    factor = cfg.norm_scaling
    if factor is None and (beside := files.folder / _SCALER).is_file():
        factor = FormatSettings(beside, read_json_object(beside)).positive("scaling_factor")
    if factor is None:
        warnings.warn(
            f"{files.settings}: normalize_activations is 'expected_average_only_in': activations have to be "
            "multiplied by a factor before they are encoded, which the file does not hold; add "
            "it to the file as norm_scaling_factor, and it is folded into the weights",
            stacklevel=2,
        )
        return sae
    return fold_norm_scaling(sae, factor)


def _hooks(sae: SAE) -> dict[str, str]:
    """`hook_name`, and of a transcoder `hook_name_out`, as far as they are known."""
    metadata, config = sae.config.metadata, sae.config
    found: dict[str, str] = {}
    for key, own, sites in (
        ("hook_name", "site", config.reads),
        ("hook_name_out", "target_site", None if sae.is_autoencoder else config.writes),
    ):
        site = None if sites is None else sites[0]
        name = said_or(metadata, key, site, hook_of(site))
        if name is not None and (key == "hook_name" or not sae.is_autoencoder):
            found[key] = name
        if site is not None:
            found[own] = site
    return found


_NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm": "constant_norm_rescale",
}


def write_saelens(sae: SAE, path: Path | WorkFolder) -> None:
    """Writes a folder for SAELens; a batch-top-k SAE becomes `jumprelu`, as SAELens itself saves them.

    Raises:
        SAEError: SAELens has no architecture for the SAE.
        OutputError: the folder is taken, or cannot be written.
    """
    config = sae.config
    activation = "jump_relu" if config.activation == "batch_topk" else config.activation
    # SAELens has skip paths in transcoders alone.
    maps = not sae.is_autoencoder or sae.W_skip is not None
    names = {
        "relu": "standard", "gated": "gated", "topk": "topk", "jump_relu": "jumprelu", "abs_topk": "abstopk",
    }  # fmt: skip
    if activation not in names:
        raise refuse("saelens", f"the activation {config.activation!r}", "'mergelab'")
    architecture = names[activation]
    if maps:
        if activation not in ("relu", "jump_relu"):
            raise refuse("saelens", f"a {config.activation} transcoder", "'mergelab' or 'sparsify'")
        before, skip = "jumprelu_" * (activation == "jump_relu"), "skip_" * (sae.W_skip is not None)
        architecture = f"{before}{skip}transcoder"
        sae = not_subtracting_b_dec(sae)
    arrays = sae.as_numpy()
    if activation == "gated":
        renamed = {"b_enc": "b_gate", "magnitude_scale": "r_mag", "magnitude_bias": "b_mag"}
        arrays = {renamed.get(name, name): value for name, value in arrays.items()}
    if "W_skip" in arrays:
        arrays["W_skip"] = np.ascontiguousarray(arrays["W_skip"].T)
    written = ("hook_name", "hook_name_out", "site", "target_site", "sae_lens_version")
    known = {
        key: value
        for key, value in config.metadata.items()
        if key not in written and (isinstance(value, str | int | float) or key in OF_THE_MODEL)
    }
    hooks = _hooks(sae)
    if maps and sae.is_autoencoder and "hook_name" in hooks:
        hooks["hook_name_out"] = hooks["hook_name"]
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.subtract_b_dec,
        "normalize_activations": _NORMALIZATIONS[config.normalization],
        "reshape_activations": "hook_z" if hooks.get("hook_name", "").endswith("_z") else "none",
        # Without a version SAELens takes the file for one of before 6, whose metadata stood elsewhere.
        "metadata": {"sae_lens_version": "6.0.0", **known, **_training(config.metadata), **hooks},
    }
    if maps:
        cfg["d_out"] = sae.d_out
    if config.needs_k:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    write_folder(path, {"cfg.json": json.dumps(cfg, indent=2) + "\n"}, {_WEIGHTS: arrays})


def _training(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of the text, where the SAE was trained here."""
    found: dict[str, Any] = {}
    trained_here = "settings" in metadata or "model_hash" in metadata
    if trained_here and not isinstance(metadata.get("prepend_bos"), bool):
        found["prepend_bos"] = False
    if isinstance(metadata.get("model"), str):
        found["model_name"] = metadata["model"]
    if isinstance(metadata.get("context"), int):
        found["context_size"] = metadata["context"]
    return found


SAELENS = FileFormat(
    name="saelens",
    read=read_saelens,
    signatures=(Signature(("W_enc", "W_dec"), ("d_in", "d_sae")),),
    weights=_WEIGHTS,
    settings="cfg.json",
    looks_for=f"cfg.json and {_WEIGHTS}",
    write=write_saelens,
)
