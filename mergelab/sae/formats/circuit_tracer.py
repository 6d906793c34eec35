"""Transcoders of one layer in circuit-tracer's files: `layer_{i}.safetensors` beside `config.yaml`.

Tensors are `W_enc [n, d]`, `W_dec [n, d]`, biases, `activation_function.threshold` of JumpReLU, and `W_skip
[d_out, d_in]` where there is one. The releases of mwhanna and mntss are such files.

Source: `circuit_tracer/transcoder/single_layer_transcoder.py` of circuit-tracer 0.5 (MIT license).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.sae.formats.cross_layer import tracer_settings
from mergelab.sae.formats.file_format import FileFormat, Files, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.shared import arrays_of, check_sizes
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["CIRCUIT_TRACER"]

_THRESHOLD = "activation_function.threshold"
_AXES = {
    "W_enc": ("n", "d_in"), "W_dec": ("n", "d_out"), "b_enc": ("n",), "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"), _THRESHOLD: ("n",),
}  # fmt: skip
_LAYER = re.compile(r"layer_(\d{1,4})\.safetensors")


class _CircuitTracer(FileFormat):
    """The format, which names of tensors alone do not tell from SAELens'."""

    def find(self, files: Files, reserved: Collection[str] = ()) -> Found | None:
        found = super().find(files, reserved)
        if found is None:
            return None
        tensors = open_weights(found.weights).tensors
        latents_first = tensors["W_enc"].shape[:1]
        fits = latents_first in (tensors["W_dec"].shape[:1], tensors["b_enc"].shape[:1])
        return found if fits else None


def read_circuit_tracer(files: Found) -> SAE:
    """Reads the file.

    Raises:
        CheckpointError: a tensor is missing, or they do not fit together.
    """
    path = files.weights
    tensors = open_weights(path).tensors
    if "log_thresholds" in tensors:
        raise CheckpointError(
            f"{path}: log_thresholds are of a training that has not finished; export it first"
        )
    check_sizes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES)
    optional = ("W_skip", _THRESHOLD)
    found = arrays_of(tensors, {name: name not in optional for name in _AXES}, path)
    return SAE(
        W_enc=found["W_enc"].T,
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        threshold=found.get(_THRESHOLD),
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        config=SAEConfig("jump_relu" if _THRESHOLD in found else "relu", **_sites(path)),
    ).checked()


def _sites(path: Path) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata`: `config.yaml` has the hooks."""
    settings = tracer_settings(path.parent)
    layer = _LAYER.fullmatch(path.name)
    names: dict[str, Any] = {"reads": None, "writes": None}
    metadata = {"model_name": settings["model_name"]} if isinstance(settings.get("model_name"), str) else {}
    for side, key, kept in (
        ("reads", "feature_input_hook", "hook_name"),
        ("writes", "feature_output_hook", "hook_name_out"),
    ):
        if layer is not None and isinstance(settings.get(key), str):
            metadata[kept] = f"blocks.{int(layer[1])}.{settings[key]}"
            site = site_of(metadata[kept])
            names[side] = None if site is None else (site,)
    known = names["reads"] is not None and names["writes"] is not None
    return {**names, "transcoder": None if known else True, "metadata": metadata}


CIRCUIT_TRACER = _CircuitTracer(
    name="circuit-tracer",
    read=read_circuit_tracer,
    signatures=(Signature(("W_enc", "W_dec", "b_enc", "b_dec"), without=("threshold",)),),
    weights="layer_0.safetensors",
    settings=None,
    looks_for="a file layer_0.safetensors of a transcoder",
)
