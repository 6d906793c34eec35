"""GPT-NeoX and Pythia: parallel blocks, partly rotated heads, query, key and value interleaved by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.families.rotary_config import ROTARY_FIELDS, read_rotary
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import FusedHeads, Row, linear_rows

__all__ = ["GPT_NEOX"]


def gpt_neox_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: the fused tensor's output features are [heads, 3, head_dim]."""
    layer = "gpt_neox.layers.{i}"
    qkv = [
        Row(
            f"blocks_{{i}}.attn.{name}.{ours}",
            f"{layer}.attention.query_key_value.{theirs}",
            FusedHeads(part, 3, c.n_heads),
        )
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        for part, name in enumerate("qkv")
    ]
    dense = {"attn.o": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return (
        Row("embed.embedding", "gpt_neox.embed_in.weight"),
        *(Row(f"blocks_{{i}}.{a}.scale", f"{layer}.{b}.weight") for a, b in norms.items()),
        *(Row(f"blocks_{{i}}.{a}.bias", f"{layer}.{b}.bias") for a, b in norms.items()),
        *qkv,
        *linear_rows("blocks_{i}", layer, dense),
        Row("final_norm.scale", "gpt_neox.final_layer_norm.weight"),
        Row("final_norm.bias", "gpt_neox.final_layer_norm.bias"),
        Row("unembed.kernel", "embed_out.weight", "transpose"),
    )


def read_gpt_neox(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ),
        optional={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
            "is_causal": True,
            **ROTARY_FIELDS,
        },
        fixed={"hidden_act": tuple(ACTIVATIONS)},
    )
    width, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    length, head_dim = fields["max_position_embeddings"], head_width(width, heads, place)
    rotary = read_rotary(
        {"partial_rotary_factor": fields["rotary_pct"]} | {k: v for k, v in fields.items() if v is not None},
        place,
        head_dim=head_dim,
        max_length=length,
        theta=fields["rotary_emb_base"],
    )
    bias = fields["attention_bias"]
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, rotary, qkv_bias=bias, out_bias=bias)
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True)
    norm = NormKind("layer", fields["layer_norm_eps"])
    placement = "parallel" if fields["use_parallel_residual"] else "pre"
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=length,
        blocks=(BlockSpec(attention, mlp, norm, placement),) * layers,
        norm=norm,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


GPT_NEOX = Family(
    "gpt_neox",
    DECODER,
    read_gpt_neox,
    gpt_neox_rows,
    prefix="gpt_neox.",
    unused=("embed_out.weight",),  # the tied copy
)
