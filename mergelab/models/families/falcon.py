"""Falcon 7B, 40B, 180B, 2 11B and RW: heads share keys, layers side by side; RW has linear biases instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.families.rotary_config import ROTARY_FIELDS, read_rotary
from mergelab.models.layers.alibi import Alibi, alibi_slopes
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, linear_rows, norm_rows

__all__ = ["FALCON"]

_LAYER = "transformer.h.{i}"
_LINEAR = {"attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}


def falcon_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: queries, keys and values lie group by group, those of heads that share a key head together.

    The two norms of a parallel block are named otherwise than those of a sequential one.
    """
    block: Any = c.blocks[0]
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if block.placement == "parallel":
        norms = {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    return (
        Row("embed.embedding", "transformer.word_embeddings.weight"),
        *(row for ours, hf in norms.items() for row in norm_rows(f"blocks_{{i}}.{ours}", f"{_LAYER}.{hf}")),
        *_query_key_value(c),
        *linear_rows("blocks_{i}", _LAYER, _LINEAR),
        *norm_rows("final_norm", "transformer.ln_f"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


def _query_key_value(c: DecoderConfig) -> Iterator[Row]:
    groups, width = c.n_kv_heads, c.head_dim
    queries = c.n_heads // groups * width
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for name, start in (("q", 0), ("k", queries), ("v", queries + width)):
            part = Fused(start, queries + 2 * width, groups=groups)
            yield Row(
                f"blocks_{{i}}.attn.{name}.{ours}", f"{_LAYER}.self_attention.query_key_value.{theirs}", part
            )


def read_falcon(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional={
            "num_kv_heads": None,
            "ffn_hidden_size": None,
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-5,
            "activation": "gelu",
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "num_ln_in_parallel_attn": None,
            "tie_word_embeddings": True,
            "is_causal": True,
            **ROTARY_FIELDS,
        },
        fixed={"activation": tuple(ACTIVATIONS), "num_ln_in_parallel_attn": (None, 1, 2)},
        inert=("apply_residual_connection_post_layernorm", "rotary", "multi_query_groups"),
    )
    width, heads, bias = fields["hidden_size"], fields["num_attention_heads"], fields["bias"]
    head_dim, placement = head_width(width, heads, place), _placement(fields, place)
    attention = AttentionSpec(
        heads, _key_heads(fields, place), head_dim, head_dim**-0.5, qkv_bias=bias, out_bias=bias
    )
    if fields["alibi"]:
        slopes = Alibi(alibi_slopes(heads), scale=attention.scale, rounded=True)
        attention = replace(attention, alibi=slopes)
    else:
        length = fields["max_position_embeddings"]
        attention = replace(
            attention, rotary=read_rotary(fields, place, head_dim=head_dim, max_length=length)
        )
    hidden = fields["ffn_hidden_size"] or 4 * width
    norm = NormKind("layer", fields["layer_norm_epsilon"])
    mlp = MLPSpec(hidden, fields["activation"], gated=False, bias=bias)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["max_position_embeddings"],
        blocks=(BlockSpec(attention, mlp, norm, placement),) * fields["num_hidden_layers"],
        norm=norm,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


def _key_heads(fields: Mapping[str, Any], place: str) -> int:
    """The number of key-value heads: the config's in the new form, else one, or one of every head."""
    heads, given = fields["num_attention_heads"], fields["num_kv_heads"]
    if fields["hidden_size"] % heads:
        raise CheckpointError(
            f"{place} has {heads} heads for a width of {fields['hidden_size']}, which they cannot share."
        )
    if not fields["new_decoder_architecture"]:
        return 1 if fields["multi_query"] else heads
    if heads % (given or heads):
        raise CheckpointError(
            f"{place} has {heads} heads for {given} key-value heads, which cannot share them evenly; correct "
            "one of the two."
        )
    return given or heads


def _placement(fields: Mapping[str, Any], place: str) -> Any:
    norms = fields["num_ln_in_parallel_attn"]
    if fields["new_decoder_architecture"]:
        return "joint" if norms == 1 else "parallel"
    if norms == 2:
        raise CheckpointError(
            f"{place} has num_ln_in_parallel_attn = 2, but only new_decoder_architecture has two norms in "
            "parallel; the model cannot be run here."
        )
    return "joint" if fields["parallel_attn"] else "pre"


FALCON = Family(
    "falcon",
    DECODER,
    read_falcon,
    falcon_rows,
    prefix="transformer.",
    unused=("lm_head.weight",),  # the tied copy
)
