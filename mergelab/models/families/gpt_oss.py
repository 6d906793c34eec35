"""gpt-oss: attention with sinks, every other layer local; experts with biases, gate and up interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import layer_types_of, read_usual_fields, usual_decoder
from mergelab.models.families.expert_fields import check_experts
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import FusedHeads, Row, linear_rows

__all__ = ["GPT_OSS"]

_LAYER, _MLP = "model.layers.{i}", "model.layers.{i}.mlp"


def gpt_oss_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: one tensor `[experts, in, out]` holds gate and up, their columns taking turns."""
    parts = {name: FusedHeads(n, 2, c.mlp_width, transposed=False) for n, name in enumerate(("gate", "up"))}
    return llama_rows(
        *LLAMA_NORMS,
        *linear_rows("blocks_{i}", _LAYER, {ours: hf for ours, hf in LLAMA_LINEAR.items() if "attn" in ours}),
        Row("blocks_{i}.attn.sinks", f"{_LAYER}.self_attn.sinks"),
        Row("blocks_{i}.mlp.router", f"{_MLP}.router.weight", "transpose"),
        Row("blocks_{i}.mlp.router_bias", f"{_MLP}.router.bias"),
        *(Row(f"blocks_{{i}}.mlp.{n}", f"{_MLP}.experts.gate_up_proj", part) for n, part in parts.items()),
        *(
            Row(f"blocks_{{i}}.mlp.{name}_bias", f"{_MLP}.experts.gate_up_proj_bias", part)
            for name, part in parts.items()
        ),
        Row("blocks_{i}.mlp.down", f"{_MLP}.experts.down_proj"),
        Row("blocks_{i}.mlp.down_bias", f"{_MLP}.experts.down_proj_bias"),
    )


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""How positions are scaled where a config does not say."""


def read_gpt_oss(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
    }
    fixed = {"hidden_act": ("silu", "swish"), "swiglu_alpha": (1.702,)}
    inert = ("experts_per_token", "initial_context_length")  # say once more what other fields say
    fields = read_usual_fields(config, place, optional, fixed, inert)
    if not fields["rope_parameters"] and not fields["rope_scaling"]:
        fields = {**fields, "rope_parameters": _YARN}
    count, bias = fields["num_hidden_layers"], fields["attention_bias"]
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    experts = Experts(
        fields["num_local_experts"],
        fields["num_experts_per_tok"],
        fields["intermediate_size"],
        "quick_gelu",
        router_bias=True,
        bias=True,
        limit=fields["swiglu_limit"],
    )
    return usual_decoder(
        fields,
        place,
        theta=150000.0,
        windows=layer_types_of(fields["layer_types"], default, fields["sliding_window"], place),
        attention={"qkv_bias": bias, "out_bias": bias, "sinks": True},
        mlp=check_experts(experts, place),
    )


GPT_OSS = Family("gpt_oss", DECODER, read_gpt_oss, gpt_oss_rows, **LLAMA_FILES)
