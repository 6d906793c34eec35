"""SAELens: `cfg.json` and `sae_weights.safetensors` (`sae_lens.SAE.load_from_disk`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import hook_of, said_or, site_of
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.shared import arrays_of, check_sizes, not_subtracting_b_dec, refuse
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["SAELENS"]

WEIGHTS = "sae_weights.safetensors"

_ACTIVATIONS = {
    "standard": "relu", "gated": "gated", "topk": "topk", "jumprelu": "jump_relu",
    "transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jump_relu",
    "jumprelu_skip_transcoder": "jump_relu",
}  # fmt: skip
_OF_THE_MODEL = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs",
    "prepend_bos", "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path",
    "sae_lens_version", "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name",
    "hf_hook_name_out",
)  # fmt: skip
"""What versions before 6 say beside the architecture, and version 6 under `metadata`."""
_NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm"}


def read_saelens(files: Found) -> SAE:
    """Reads a folder of SAELens.

    Raises:
        CheckpointError: a file is missing, or of an architecture or normalization that is not supported.
    """
    settings, file, cfg_file = files.told, files.weights, files.settings
    cfg: dict[str, Any] = dict(settings.values)
    architecture = settings.word("architecture", _ACTIVATIONS, "standard")
    normalization = cfg.get("normalize_activations", "none")
    if not isinstance(normalization, str) or normalization not in _NORMALIZATIONS:
        raise CheckpointError(
            f"{cfg_file}: normalize_activations {normalization!r} needs data not in the file; "
            "fold it in SAELens first (fold_activation_norm_scaling_factor)"
        )
    gated = architecture == "gated"
    wanted = {"W_enc": True, "W_dec": True, "b_dec": True, "b_enc": not gated}
    wanted |= {name: gated for name in ("b_gate", "r_mag", "b_mag")}
    maps = "transcoder" in architecture
    wanted |= {"threshold": _ACTIVATIONS[architecture] == "jump_relu", "W_skip": "skip" in architecture}
    tensors = open_weights(file).tensors
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        _axes("d_out" if maps else "d_in"),
        cfg_file,
        {name: (name, cfg.get(name)) for name in ("d_in", "d_sae", *(["d_out"] if maps else []))},
    )
    found = arrays_of(tensors, wanted, file)
    config = SAEConfig(
        activation=_ACTIVATIONS[architecture],
        k=settings.whole("k") if architecture == "topk" else None,
        subtract_b_dec=settings.flag("apply_b_dec_to_input", True) and not maps,
        normalization=_NORMALIZATIONS[normalization],
        **_sites(settings.values, settings.mapping("metadata"), maps),
    )
    if settings.flag("rescale_acts_by_decoder_norm", False) and architecture == "topk":
        # Codes count in units of the decoder's norms: the same as a decoder of norm 1.
        norms = jnp.linalg.norm(found["W_dec"], axis=1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norms[None, :], found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / norms[:, None]
    return SAE(
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


def _axes(out: str) -> dict[str, tuple[str, ...]]:
    latents = ("b_enc", "b_gate", "r_mag", "b_mag", "threshold")
    both = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", out), "b_dec": (out,), "W_skip": (out, "d_in")}
    return both | {name: ("d_sae",) for name in latents}


def _sites(cfg: Mapping[str, Any], own: Mapping[str, Any], maps: bool) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata` of a configuration, whose hooks become sites."""
    said = {key: cfg[key] for key in _OF_THE_MODEL if cfg.get(key) is not None}
    if "hook_point" in cfg:
        said.setdefault("hook_name", cfg["hook_point"])
    metadata = {**said, **own}
    hook, target = metadata.get("hook_name"), metadata.get("hook_name_out")
    reads = site_of(hook) or site_of(metadata.get("site"))
    writes = site_of(target) or site_of(metadata.get("target_site"))
    if hook is not None and target is not None:
        maps = hook != target  # also where the hooks are not sites here
    known = reads is not None and writes is not None
    return {
        "reads": None if reads is None else (reads,),
        "writes": None if writes is None else (writes,),
        "transcoder": None if known else maps,
        "metadata": metadata,
    }


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
    names = {"relu": "standard", "gated": "gated", "topk": "topk", "jump_relu": "jumprelu"}
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
    names = ("hook_name", "hook_name_out", "site", "target_site")
    known = {
        key: value
        for key, value in config.metadata.items()
        if isinstance(value, str | int | float) and key not in names
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
        "normalize_activations": config.normalization,
        "reshape_activations": "none",
        # Without a version SAELens takes the file for one of before 6, whose metadata stood elsewhere.
        "metadata": {"sae_lens_version": "6.0.0", **known, **_training(config.metadata), **hooks},
    }
    if maps:
        cfg["d_out"] = sae.d_out
    if activation == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    write_folder(path, {"cfg.json": json.dumps(cfg, indent=2) + "\n"}, {WEIGHTS: arrays})


def _training(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of the text, where the SAE was trained here."""
    found: dict[str, Any] = {}
    if "settings" in metadata or "model_hash" in metadata:
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
    weights=WEIGHTS,
    settings="cfg.json",
    looks_for=f"cfg.json and {WEIGHTS}",
    write=write_saelens,
)
