"""BLOOM: linear biases in place of positions, a norm of embeddings, query, key and value fused by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.alibi import Alibi, alibi_slopes
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import FusedHeads, Row, linear_rows, norm_rows

__all__ = ["BLOOM"]

_LAYER = "transformer.h.{i}"
_LINEAR = {"attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}


def bloom_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: the fused tensor's output features are [heads, 3, head_dim]."""
    return (
        Row("embed.embedding", "transformer.word_embeddings.weight"),
        *norm_rows("embed_norm", "transformer.word_embeddings_layernorm"),
        *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.input_layernorm"),
        *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *(
            Row(
                f"blocks_{{i}}.attn.{name}.{ours}",
                f"{_LAYER}.self_attention.query_key_value.{theirs}",
                FusedHeads(part, 3, c.n_heads),
            )
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
            for part, name in enumerate("qkv")
        ),
        *linear_rows("blocks_{i}", _LAYER, _LINEAR),
        *norm_rows("final_norm", "transformer.ln_f"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


def read_bloom(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    # The first files have other names for the sizes, and a length that nothing bounds.
    old = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    config = {**{new: config[name] for name, new in old.items() if name in config}, **config}
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "n_layer", "n_head"),
        optional={
            "seq_length": 2048,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "is_causal": True,
        },
        fixed={"apply_residual_connection_post_layernorm": (False,)},
        inert=(
            *old,
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "n_inner",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "slow_but_exact",
        ),
    )
    width, heads = fields["hidden_size"], fields["n_head"]
    head_dim = head_width(width, heads, place)
    if head_dim * heads != width:
        raise CheckpointError(f"{place} has {heads} heads for a width of {width}, which they cannot share.")
    slopes = Alibi(alibi_slopes(heads))
    attention = AttentionSpec(
        heads, heads, head_dim, head_dim**-0.5, qkv_bias=True, out_bias=True, alibi=slopes
    )
    norm = NormKind("layer", fields["layer_norm_epsilon"])
    mlp = MLPSpec(4 * width, "gelu_new", gated=False, bias=True)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["seq_length"],
        blocks=(BlockSpec(attention, mlp, norm),) * fields["n_layer"],
        norm=norm,
        embed_norm=norm,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


BLOOM = Family(
    "bloom",
    DECODER,
    read_bloom,
    bloom_rows,
    prefix="transformer.",
    unused=("lm_head.weight",),  # the tied copy
)
