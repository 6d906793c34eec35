"""GLM-4: `glm` and `glm4`, which also normalizes what layers add; neighbors rotated, gate and up fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder, usual_rotary
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, linear_rows

__all__ = ["GLM", "GLM4"]

_LAYER = "model.layers.{i}"
_LINEAR = {ours: hf for ours, hf in LLAMA_LINEAR.items() if ours not in ("mlp.gate", "mlp.up")}


def glm_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: one tensor holds gate and up, one after the other."""
    hidden = c.mlp_width
    return llama_rows(
        *LLAMA_NORMS,
        Row("blocks_{i}.attn.out_norm.scale", f"{_LAYER}.post_self_attn_layernorm.weight"),
        Row("blocks_{i}.mlp.out_norm.scale", f"{_LAYER}.post_mlp_layernorm.weight"),
        *linear_rows("blocks_{i}", _LAYER, _LINEAR),
        *(
            Row(f"blocks_{{i}}.mlp.{name}.kernel", f"{_LAYER}.mlp.gate_up_proj.weight", Fused(at, 2 * hidden))
            for name, at in (("gate", 0), ("up", hidden))
        ),
    )


def read_glm(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    return _read(config, place, "pre")


def read_glm4(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    return _read(config, place, "sandwich")


def _read(config: Mapping[str, Any], place: str, placement: str) -> DecoderConfig:
    optional = {
        "intermediate_size": 13696,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    }
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    rotary = replace(usual_rotary(fields, place), neighbors=True)
    return usual_decoder(
        fields,
        place,
        rotary=(rotary,) * fields["num_hidden_layers"],
        attention={"qkv_bias": fields["attention_bias"]},
        block={"placement": placement},
    )


GLM = Family("glm", DECODER, read_glm, glm_rows, **LLAMA_FILES)
GLM4 = Family("glm4", DECODER, read_glm4, glm_rows, **LLAMA_FILES)
