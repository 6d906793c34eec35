"""Cohere 1 (Command R) and 2 (R7B): blocks of one norm, neighbors rotated, scaled logits; 2 has windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import (
    layer_types_of,
    read_usual_fields,
    usual_decoder,
    usual_rotary,
)
from mergelab.models.families.llama import LLAMA_FILES
from mergelab.models.families.qwen import QWEN3_ROWS
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.model import Family

__all__ = ["COHERE", "COHERE2"]

_OPTIONAL: Mapping[str, Any] = {
    "intermediate_size": 22528,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_FIXED: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}


def read_cohere(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_usual_fields(config, place, {**_OPTIONAL, "use_qk_norm": False}, _FIXED)
    rotary = (_rotary(fields, place, 500000.0),) * fields["num_hidden_layers"]
    norm = NormKind("layer", fields["layer_norm_eps"], biased=False)
    heads = {"qk_norm": norm, "qk_norm_over": "each"} if fields["use_qk_norm"] else {}
    return _decoder(fields, place, heads, rotary=rotary)


def read_cohere2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "_sliding_window_pattern": None,
        "layer_types": None,
    }
    # Of the first files: what the only form is, or what nothing reads.
    inert = ("order_of_interleaved_layers", "position_embedding_type", "rotary_pct", "use_gated_activation")
    inert += ("use_embedding_sharing", "use_parallel_block", "use_parallel_embedding")
    fields = read_usual_fields(config, place, optional, {**_FIXED, "use_qk_norm": (False,)}, inert)
    count = fields["num_hidden_layers"]
    every = fields["_sliding_window_pattern"] or fields["sliding_window_pattern"] or 4
    default = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    windows = layer_types_of(fields["layer_types"], default, fields["sliding_window"], place)
    one = _rotary(fields, place, 10000.0)
    rotary = tuple(None if window is None else one for window in windows)  # global layers are not rotated
    return _decoder(fields, place, {}, rotary=rotary, windows=windows)


def _rotary(fields: Mapping[str, Any], place: str, theta: float) -> Rotary:
    return replace(usual_rotary(fields, place, theta), neighbors=True)


def _decoder(fields: Mapping[str, Any], place: str, heads: Mapping[str, Any], **layers: Any) -> DecoderConfig:
    bias = fields["attention_bias"]
    norm = NormKind("layer", fields["layer_norm_eps"], biased=False)
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": bias, "out_bias": bias, **heads},
        block={"norm": norm, "placement": "joint"},
        logit_scale=fields["logit_scale"],
        **layers,
    )


COHERE = Family("cohere", DECODER, read_cohere, lambda _: QWEN3_ROWS, **LLAMA_FILES)
COHERE2 = Family("cohere2", DECODER, read_cohere2, lambda _: QWEN3_ROWS, **LLAMA_FILES)
