"""Llama 2 and 3, and everything built on their names: RMS norms, rotary positions, gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.config_fields import read_fields
from mergelab.models.config_rotary import ROTARY_FIELDS, read_rotary
from mergelab.models.decoder import DECODER
from mergelab.models.decoder_config import DecoderConfig
from mergelab.models.family import Family
from mergelab.models.layers.norms import NormKind
from mergelab.models.table import Row, linear_rows

__all__ = ["LLAMA", "LLAMA_ROWS", "LLAMA_UNUSED"]

_LINEAR = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

LLAMA_ROWS = (
    Row("embed.embedding", "model.embed_tokens.weight"),
    Row("blocks_{i}.attn_norm.scale", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks_{i}.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
    *linear_rows("blocks_{i}", "model.layers.{i}", _LINEAR),
    Row("final_norm.scale", "model.norm.weight"),
    Row("unembed.kernel", "lm_head.weight", "transpose"),
)

# The rotary frequencies that old files hold, and the copy that some tied models store.
LLAMA_UNUSED = ("*.rotary_emb.inv_freq",)


def read_llama(config: Mapping[str, Any], place: str) -> DecoderConfig:
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
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            **ROTARY_FIELDS,
        },
        fixed={"hidden_act": ("silu",)},
    )
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    head_dim = fields["head_dim"] or fields["hidden_size"] // heads
    rotary = read_rotary(fields, place, head_dim=head_dim, max_length=fields["max_position_embeddings"])
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        rotary=(rotary,) * layers,
        windows=(None,) * layers,
        query_scale=head_dim**-0.5,
        norm=NormKind("rms", fields["rms_norm_eps"]),
        qkv_bias=fields["attention_bias"],
        out_bias=fields["attention_bias"],
        mlp_bias=fields["mlp_bias"],
        tied=fields["tie_word_embeddings"],
    )


LLAMA = Family("llama", DECODER, read_llama, lambda _: LLAMA_ROWS, unused=LLAMA_UNUSED)
