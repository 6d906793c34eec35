"""OLMo 1 (norms without parameters), 2 (norms of queries, keys and what layers add) and 3 (windows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import (
    layer_types_of,
    read_usual_fields,
    usual_decoder,
    usual_rotary,
)
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_ROWS, llama_rows
from mergelab.models.families.rotary_config import rotary_from
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["OLMO", "OLMO2", "OLMO3"]

_LAYER = "model.layers.{i}"
OLMO2_ROWS = llama_rows(
    *linear_rows("blocks_{i}", _LAYER, LLAMA_LINEAR),
    Row("blocks_{i}.attn.q_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
    Row("blocks_{i}.attn.k_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
    Row("blocks_{i}.attn.out_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
    Row("blocks_{i}.mlp.out_norm.scale", f"{_LAYER}.post_feedforward_layernorm.weight"),
)
_OPTIONAL: Mapping[str, Any] = {
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
}
_FIXED: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}


def read_olmo(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_usual_fields(config, place, {**_OPTIONAL, "clip_qkv": None}, _FIXED)
    bias = fields["attention_bias"]
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": bias, "out_bias": bias, "clip": fields["clip_qkv"]},
        block={"norm": NormKind("layer", 1e-5, scaled=False, biased=False)},
    )


def read_olmo2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_usual_fields(config, place, _OPTIONAL, _FIXED)
    return _normed_outputs(fields, place)


def read_olmo3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {**_OPTIONAL, "sliding_window": 4096, "layer_types": None}
    fields = read_usual_fields(config, place, optional, _FIXED)
    count = fields["num_hidden_layers"]
    default = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(count)]
    windows = layer_types_of(fields["layer_types"], default, fields["sliding_window"], place)
    full, sliding = _rotaries(fields, place)
    rotary = tuple(full if window is None else sliding for window in windows)
    return _normed_outputs(fields, place, windows=windows, rotary=rotary)


def _normed_outputs(fields: Mapping[str, Any], place: str, **layers: Any) -> DecoderConfig:
    bias = fields["attention_bias"]
    norm = NormKind("rms", fields["rms_norm_eps"])
    attention = {"qkv_bias": bias, "out_bias": bias, "qk_norm": norm, "qk_norm_over": "all"}
    return usual_decoder(fields, place, attention=attention, block={"placement": "post"}, **layers)


def _rotaries(fields: Mapping[str, Any], place: str) -> tuple[Rotary, Rotary]:
    """The rotation of global layers and that of local ones, which scaling leaves alone."""
    theta, given = fields["rope_theta"] or 500000.0, fields["rope_parameters"] or {}
    if not ("full_attention" in given or "sliding_attention" in given):
        full = usual_rotary(fields, place, theta)
        return full, Rotary(full.theta, full.dim)
    sizes = {"head_dim": fields["head_dim"], "max_length": fields["max_position_embeddings"]}
    names = ("full_attention", "sliding_attention")
    full, sliding = (rotary_from(given.get(name) or {}, place, theta=theta, **sizes) for name in names)
    return full, sliding


OLMO = Family("olmo", DECODER, read_olmo, lambda _: LLAMA_ROWS, **LLAMA_FILES)
OLMO2 = Family("olmo2", DECODER, read_olmo2, lambda _: OLMO2_ROWS, **LLAMA_FILES)
OLMO3 = Family("olmo3", DECODER, read_olmo3, lambda _: OLMO2_ROWS, **LLAMA_FILES)
