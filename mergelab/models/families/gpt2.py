"""GPT-2: learned positions, layer norms, and kernels stored [in, out] with query, key and value fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row

__all__ = ["GPT2"]


def gpt2_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table; HF's `Conv1D` keeps kernels as we do, so only the fused tensor is cut."""
    block = "transformer.h.{i}"
    qkv = [
        Row(
            f"blocks_{{i}}.attn.{name}.{ours}",
            f"{block}.attn.c_attn.{theirs}",
            Fused(part * c.d_model, 3 * c.d_model, transposed=False),
        )
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        for part, name in enumerate("qkv")
    ]
    dense = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    norms = {"attn_norm": "ln_1", "mlp_norm": "ln_2"}
    return (
        Row("embed.embedding", "transformer.wte.weight"),
        Row("positions.embedding", "transformer.wpe.weight"),
        *(Row(f"blocks_{{i}}.{a}.scale", f"{block}.{b}.weight") for a, b in norms.items()),
        *(Row(f"blocks_{{i}}.{a}.bias", f"{block}.{b}.bias") for a, b in norms.items()),
        *qkv,
        *(Row(f"blocks_{{i}}.{a}.kernel", f"{block}.{b}.weight") for a, b in dense.items()),
        *(Row(f"blocks_{{i}}.{a}.bias", f"{block}.{b}.bias") for a, b in dense.items()),
        Row("final_norm.scale", "transformer.ln_f.weight"),
        Row("final_norm.bias", "transformer.ln_f.bias"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


def read_gpt2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "n_embd", "n_layer", "n_head"),
        optional={
            "n_positions": 1024,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "n_ctx": None,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "is_causal": True,
        },
        fixed={"activation_function": tuple(ACTIVATIONS), "add_cross_attention": (False,)},
        # The third computes the same in another order; the other two are of the first GPT-2 files.
        inert=("n_special", "predict_special_tokens", "reorder_and_upcast_attn"),
    )
    width, layers, heads = fields["n_embd"], fields["n_layer"], fields["n_head"]
    head_dim = head_width(width, heads, place)
    scale = head_dim**-0.5 if fields["scale_attn_weights"] else 1.0
    attention = AttentionSpec(heads, heads, head_dim, scale, qkv_bias=True, out_bias=True)
    hidden, activation = fields["n_inner"] or 4 * width, fields["activation_function"]
    mlp = MLPSpec(hidden, activation, gated=False, bias=True)
    norm = NormKind("layer", fields["layer_norm_epsilon"])
    blocks = (BlockSpec(attention, mlp, norm),) * layers
    if fields["scale_attn_by_inverse_layer_idx"]:  # Mistral's GPT-2 models (stanford-crfm)
        blocks = tuple(
            replace(block, attention=replace(attention, scale=scale / (i + 1)))
            for i, block in enumerate(blocks)
        )
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["n_positions"],
        blocks=blocks,
        norm=norm,
        learned_positions=True,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


GPT2 = Family(
    "gpt2",
    DECODER,
    read_gpt2,
    gpt2_rows,
    prefix="transformer.",
    unused=("lm_head.weight",),  # the tied copy
)
