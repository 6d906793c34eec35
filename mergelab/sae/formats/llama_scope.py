"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, and its R1 distillation.

The SAE reads `x * s_in` with `s_in = sqrt(d) / mean norm of the input`, and writes in units of `s_out`. Its
threshold is in units of the raw output after each decoder row has been given norm 1, which OpenMOSS does
before it uses them. Both are folded here; codes keep the unit of the normalized input, as SAELens has it.

Source: He et al. 2024, arXiv:2410.20526; `Language-Model-SAEs` of OpenMOSS; `llama_scope` loaders of SAELens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mergelab.sae.formats.file_format import FileFormat, Files, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.settings import FormatSettings, faults_at_once
from mergelab.sae.formats.shared import arrays_of, check_sizes
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["LLAMA_SCOPE"]

_AXES = {
    "encoder.weight": ("n", "d"), "encoder.bias": ("n",), "decoder.weight": ("out", "n"),
    "decoder.bias": ("out",), "log_jumprelu_threshold": ("n",),
}  # fmt: skip
_WEIGHTS = Path("checkpoints", "final.safetensors")


class _LlamaScope(FileFormat):
    """The format, whose weights stand in a folder below the settings."""

    def find(self, files: Files, reserved: Collection[str] = ()) -> Found | None:
        settings, weights = files.path / "hyperparams.json", files.path / _WEIGHTS
        if settings.is_file() and weights.is_file():
            return Found(weights, settings)
        return super().find(files, reserved)


def read_llama_scope(files: Found) -> SAE:
    """Reads a folder of either.

    Raises:
        CheckpointError: a file or a norm is missing, or tensors do not fit together.
    """
    settings, weights = files.told, files.weights
    first = settings.path.name == "hyperparams.json"
    tensors = open_weights(weights).tensors
    said = settings.values
    width = (tensors["encoder.weight"].shape if "encoder.weight" in tensors else ()) or (1,)
    with faults_at_once(settings) as told:
        scale, scale_out = _scales(told, width[-1])
        limit, over_norms, centered = 0.0, False, told.flag("apply_decoder_bias_to_pre_encoder", False)
        if first:
            told.word("act_fn", ("jumprelu",), "jumprelu")
            limit = told.positive("jump_relu_threshold")
            over_norms = told.flag("sparsity_include_decoder_norm", True)
        check_sizes(
            weights,
            {name: tensor.shape for name, tensor in tensors.items()},
            _AXES,
            settings.path,
            {"d": ("d_model", said.get("d_model")), "n": ("d_sae", said.get("d_sae"))},
        )
    wanted = {name: name != "log_jumprelu_threshold" or not first for name in _AXES}
    found = arrays_of(tensors, wanted, weights)
    W_dec = found["decoder.weight"].T
    if first:
        threshold = jnp.full(len(W_dec), limit * scale_out, jnp.float32)
        if over_norms:
            threshold = threshold / jnp.maximum(jnp.linalg.norm(W_dec, axis=1), 1e-30)
    else:
        threshold = jnp.exp(found["log_jumprelu_threshold"])
    return SAE(
        W_enc=found["encoder.weight"].T * scale,
        b_enc=found["encoder.bias"],
        W_dec=W_dec / scale_out,
        b_dec=found["decoder.bias"] / scale_out,
        threshold=threshold,
        config=SAEConfig(
            "jump_relu",
            subtract_b_dec=centered,
            **_sites(said),
        ),
    ).checked()


def _scales(settings: FormatSettings, width: int) -> tuple[float, float]:
    """`s_in` and `s_out`: of the file, or of the table of releases."""
    norms = settings.values.get("dataset_average_activation_norm")
    if isinstance(norms, Mapping):
        inner = settings.inner("dataset_average_activation_norm")
        mean_in = inner.positive("in")
        return math.sqrt(width) / mean_in, math.sqrt(width) / (
            inner.positive("out") if "out" in inner.values else mean_in
        )
    if "norm_scaling_factor" not in settings.values:
        settings.refuse(
            "dataset_average_activation_norm is missing, so the scale of the activations is not known unless "
            "the SAE is loaded by its release (llama_scope_r1_distill) or by its name on the hub"
        )
        return 1.0, 1.0
    scale = settings.positive("norm_scaling_factor")
    return scale, scale


def _sites(said: Mapping[str, Any]) -> dict[str, Any]:
    hooks = {
        name: said[key]
        for name, key in (("hook_name", "hook_point_in"), ("hook_name_out", "hook_point_out"))
        if isinstance(said.get(key), str)
    }
    reads, target = site_of(hooks.get("hook_name")), hooks.get("hook_name_out")
    transcoder = target is not None and target != hooks.get("hook_name")
    writes = site_of(target) if transcoder else reads
    known = reads is not None and writes is not None
    return {
        "reads": None if reads is None else (reads,),
        "writes": None if writes is None else (writes,),
        "transcoder": None if known else transcoder,
        "metadata": hooks if transcoder else {key: hooks[key] for key in ("hook_name",) if key in hooks},
    }


LLAMA_SCOPE = _LlamaScope(
    name="llama-scope",
    read=read_llama_scope,
    signatures=(
        Signature(tuple(_AXES), settings=("d_model",)),
        Signature(("encoder.weight", "decoder.weight"), settings=("jump_relu_threshold", "d_sae")),
    ),
    weights=_WEIGHTS.name,
    settings="hyperparams.json",
    looks_for="hyperparams.json and checkpoints/final.safetensors",
)
