"""Llama 2 and 3, and everything built on their names: RMS norms, rotary positions, gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["LLAMA", "LLAMA_FILES", "LLAMA_LINEAR", "LLAMA_NORMS", "LLAMA_ROWS", "llama_rows"]

# Our linear layers to HF's, within a block.
LLAMA_LINEAR = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def llama_rows(*block_rows: Row) -> tuple[Row, ...]:
    """A table with Llama's names outside the blocks."""
    return (
        Row("embed.embedding", "model.embed_tokens.weight"),
        *block_rows,
        Row("final_norm.scale", "model.norm.weight"),
        Row("unembed.kernel", "lm_head.weight", "transpose"),
    )


LLAMA_NORMS = (
    Row("blocks_{i}.attn_norm.scale", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks_{i}.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
)
LLAMA_ROWS = llama_rows(*LLAMA_NORMS, *linear_rows("blocks_{i}", "model.layers.{i}", LLAMA_LINEAR))


class _Files(TypedDict):
    prefix: str
    unused: tuple[str, ...]


# What files hold beside the table: the head of tied models is a copy of the embedding.
LLAMA_FILES: _Files = {"prefix": "model.", "unused": ("lm_head.weight",)}


def read_llama(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False}
    fields = read_usual_fields(
        config, place, optional, {"hidden_act": ("silu", "swish"), "rope_interleaved": (False, None)}
    )
    bias = fields["attention_bias"]
    mlp = MLPSpec(fields["intermediate_size"], bias=fields["mlp_bias"])
    return usual_decoder(fields, place, attention={"qkv_bias": bias, "out_bias": bias}, mlp=mlp)


LLAMA = Family("llama", DECODER, read_llama, lambda _: LLAMA_ROWS, **LLAMA_FILES)
