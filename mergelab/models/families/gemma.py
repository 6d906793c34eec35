"""Gemma 1; Gemma 2 and 3 (text): norms around each layer, local and global attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import layer_types_of, read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_ROWS, llama_rows
from mergelab.models.families.rotary_config import read_rotary, rotary_from
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["GEMMA", "GEMMA2", "GEMMA3_TEXT"]

GEMMA_ROWS = llama_rows(
    Row("blocks_{i}.attn_norm.scale", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks_{i}.attn.out_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("blocks_{i}.mlp_norm.scale", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    Row("blocks_{i}.mlp.out_norm.scale", "model.layers.{i}.post_feedforward_layernorm.weight"),
    *linear_rows("blocks_{i}", "model.layers.{i}", LLAMA_LINEAR),
    Row("blocks_{i}.attn.q_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("blocks_{i}.attn.k_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
)

_OPTIONAL: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
# The first files have a `hidden_act` of `gelu`; transformers reads `hidden_activation`, the tanh form, alone.
_FIXED: Mapping[str, Any] = {"hidden_activation": ("gelu_pytorch_tanh", None)}
_INERT = ("hidden_act", "sliding_window_size")


def read_gemma(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    # The first files name the exact form; what was trained, and what transformers computes, is the tanh form.
    acts = ("gelu", "gelu_pytorch_tanh", None)
    fixed = {"hidden_act": acts, "hidden_activation": acts, "use_bidirectional_attention": (None, False)}
    fields = read_usual_fields(config, place, optional, fixed)
    bias = fields["attention_bias"]
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": bias, "out_bias": bias},
        mlp=MLPSpec(fields["intermediate_size"], "gelu_pytorch_tanh"),
        block={"norm": NormKind("rms", fields["rms_norm_eps"], offset=1.0)},
        embed_scale=fields["hidden_size"] ** 0.5,
    )


def read_gemma2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    fixed = {**_FIXED, "use_bidirectional_attention": (None, False)}
    fields = read_usual_fields(config, place, optional, fixed, _INERT)
    return _decoder(fields, place, _windows(fields, place, every=2))


def read_gemma3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": None,
        "use_bidirectional_attention": False,
    }
    fields = read_usual_fields(config, place, optional, _FIXED, _INERT)
    if fields["use_bidirectional_attention"]:
        # EmbeddingGemma: a window of so many tokens in all, the token itself in its middle.
        window = fields["sliding_window"]
        fields |= {"is_causal": False, "sliding_window": None if window is None else window // 2}
    every = fields["_sliding_window_pattern"] or fields["sliding_window_pattern"] or 6
    windows = _windows(fields, place, every)
    full, sliding = _rotaries(fields, place)
    return _decoder(
        fields,
        place,
        windows,
        rotary=tuple(full if window is None else sliding for window in windows),
        attention={"qk_norm": NormKind("rms", fields["rms_norm_eps"], offset=1.0)},
    )


def _windows(fields: Mapping[str, Any], place: str, every: int) -> tuple[int | None, ...]:
    """Every `every`-th layer attends to all tokens."""
    count = fields["num_hidden_layers"]
    default = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    return layer_types_of(fields["layer_types"], default, fields["sliding_window"], place)


def _rotaries(fields: Mapping[str, Any], place: str) -> tuple[Rotary, Rotary]:
    """The rotation of global layers and that of local ones, which scaling leaves alone."""
    sizes = {"head_dim": fields["head_dim"], "max_length": fields["max_position_embeddings"]}
    given = fields["rope_parameters"] or {}
    if "full_attention" in given or "sliding_attention" in given:
        full = rotary_from(given.get("full_attention") or {}, place, theta=1e6, **sizes)
        return full, rotary_from(given.get("sliding_attention") or {}, place, theta=1e4, **sizes)
    local = Rotary(float(fields["rope_local_base_freq"]), fields["head_dim"])
    return read_rotary(fields, place, theta=1e6, **sizes), local


def _decoder(
    fields: Mapping[str, Any],
    place: str,
    windows: tuple[int | None, ...],
    rotary: tuple[Rotary, ...] | None = None,
    attention: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    return usual_decoder(
        fields,
        place,
        windows=windows,
        rotary=rotary,
        attention={
            "scale": fields["query_pre_attn_scalar"] ** -0.5,
            "qkv_bias": fields["attention_bias"],
            "out_bias": fields["attention_bias"],
            "cap": fields["attn_logit_softcapping"],
            **(attention or {}),
        },
        mlp=MLPSpec(fields["intermediate_size"], "gelu_pytorch_tanh"),
        block={"norm": NormKind("rms", fields["rms_norm_eps"], offset=1.0), "placement": "sandwich"},
        logit_cap=fields["final_logit_softcapping"],
        embed_scale=fields["hidden_size"] ** 0.5,
    )


GEMMA = Family("gemma", DECODER, read_gemma, lambda _: LLAMA_ROWS, **LLAMA_FILES)
GEMMA2 = Family("gemma2", DECODER, read_gemma2, lambda _: GEMMA_ROWS, **LLAMA_FILES)
GEMMA3_TEXT = Family("gemma3_text", DECODER, read_gemma3, lambda _: GEMMA_ROWS, **LLAMA_FILES)
