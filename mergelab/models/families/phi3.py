"""Phi-3: Llama whose files fuse query, key and value, and gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_NORMS, llama_rows
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row

__all__ = ["PHI3"]


def phi3_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: the fused tensors hold their parts one after the other."""
    layer = "model.layers.{i}"
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    hidden = c.mlp_width
    starts = {"q": 0, "k": queries, "v": queries + keys}
    qkv = [
        Row(
            f"blocks_{{i}}.attn.{name}.kernel",
            f"{layer}.self_attn.qkv_proj.weight",
            Fused(start, queries + 2 * keys),
        )
        for name, start in starts.items()
    ]
    gate_up = [
        Row(
            f"blocks_{{i}}.mlp.{name}.kernel",
            f"{layer}.mlp.gate_up_proj.weight",
            Fused(start, 2 * hidden),
        )
        for name, start in (("gate", 0), ("up", hidden))
    ]
    return llama_rows(
        *LLAMA_NORMS,
        *qkv,
        Row("blocks_{i}.attn.o.kernel", f"{layer}.self_attn.o_proj.weight", "transpose"),
        *gate_up,
        Row("blocks_{i}.mlp.down.kernel", f"{layer}.mlp.down_proj.weight", "transpose"),
    )


def read_phi3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }
    fixed = {"hidden_act": ("silu", "swish")}
    fields = read_usual_fields(config, place, optional, fixed)
    return usual_decoder(fields, place, windows=(fields["sliding_window"],) * fields["num_hidden_layers"])


PHI3 = Family("phi3", DECODER, read_phi3, phi3_rows, **LLAMA_FILES)
