"""Which tensors of a checkpoint are quantized: the files say it by names and types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_optional_json
from mergelab.checkpoints.quantized.bitsandbytes import find_bitsandbytes
from mergelab.checkpoints.quantized.findings import Findings, Settings
from mergelab.checkpoints.quantized.gptq_awq import find_gptq_and_awq
from mergelab.checkpoints.quantized.mxfp4 import find_mxfp4
from mergelab.checkpoints.quantized.packed_weights import find_packed_weights
from mergelab.checkpoints.quantized.scaled_weights import find_scaled_weights
from mergelab.checkpoints.quantized.unreadable import drop_cache_scales, name_the_rest
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.tied_head import conv1d_layers
from mergelab.errors import CheckpointError

__all__ = ["SplitConfig", "dequantized", "split_config"]

_READERS = (find_bitsandbytes, find_mxfp4, find_gptq_and_awq, find_packed_weights, find_scaled_weights)
_KEYS = ("quantization_config", "compression_config")
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_OTHER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where AutoGPTQ, AutoAWQ and ModelOpt put it, beside or in place of `config.json`."""


@dataclass(frozen=True)
class SplitConfig:
    """A `config.json` in two.

    Attributes:
        model: All of it that describes the model.
        quantization: What describes how its weights are quantized; empty if nothing does.
    """

    model: Mapping[str, Any]
    quantization: Mapping[str, Any]


def split_config(config: Mapping[str, Any], folder: Path) -> SplitConfig:
    """Takes what is said of a quantization out of a config, or out of the files that say it in its place.

    Raises:
        CheckpointError: such a file cannot be read.
    """
    model, found = _without(config)
    for key in _PARTS:
        if isinstance(part := model.get(key), Mapping) and any(name in part for name in _KEYS):
            inner, said = _without(part)
            model, found = {**model, key: inner}, found or said
    for name in _OTHER_FILES:
        if not found:
            content = read_optional_json(folder / name)
            inner = content.get("quantization")
            found = inner if isinstance(inner, Mapping) else content
    return SplitConfig(config if model == config else model, found)


def _without(config: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    said = [config[key] for key in _KEYS if isinstance(config.get(key), Mapping)]
    return {key: value for key, value in config.items() if key not in _KEYS}, said[0] if said else {}


def dequantized(
    tensors: Mapping[str, TensorSource], config: SplitConfig, place: str
) -> Mapping[str, TensorSource]:
    """The tensors of the model that stored tensors are: quantized ones in float32 under their plain names.

    Tensors that are not quantized are the same objects; if none is, so is the mapping. Scales, zero points
    and what belongs to activations and the cache are not among the names.

    Args:
        tensors: Stored tensors by name, in file order.
        config: The checkpoint's.
        place: The checkpoint's path, for messages.

    Raises:
        CheckpointError: a quantized tensor cannot be read; all such are named at once.
    """
    findings = Findings(place, tensors, Settings.of(config.quantization), conv1d_layers(config.model))
    for find in _READERS:
        find(findings)
    if findings.used or config.quantization:
        drop_cache_scales(findings)
    name_the_rest(findings, bool(config.quantization))
    if findings.faults:
        raise CheckpointError(findings.faults)
    if not findings.used:
        return tensors
    model: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if (source := findings.found.get(name)) is not None:
            model[source.name] = source
        elif name not in findings.used:
            model[name] = tensor
    return model
