"""NeoBERT: neighbors rotated, RMS norms on what layers read, gated layers (arXiv:2502.19587)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.families.rotary_config import rotary_from
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Fused, FusedHeads, Row

__all__ = ["NEOBERT"]

_LAYER = "model.transformer_encoder.{i}"
# How weights began, and what the training code writes beside it.
_INERT = (
    "decoder_init_range",
    "dropout",
    "embedding_init_range",
    "flash_attention",
    "kwargs",
    "trust_remote_code",
)


def _rows(config: EncoderConfig) -> Iterator[Row]:
    block: Any = config.blocks[0]
    heads, hidden = block.attention.n_heads, block.mlp.hidden
    yield Row("embed.embedding", "model.encoder.weight")
    yield Row("blocks_{i}.attn_norm.scale", f"{_LAYER}.attention_norm.weight")
    for part, name in enumerate("qkv"):
        yield Row(f"blocks_{{i}}.attn.{name}.kernel", f"{_LAYER}.qkv.weight", FusedHeads(part, 3, heads))
    yield Row("blocks_{i}.attn.o.kernel", f"{_LAYER}.wo.weight", "transpose")
    yield Row("blocks_{i}.mlp_norm.scale", f"{_LAYER}.ffn_norm.weight")
    for part, name in enumerate(("gate", "up")):
        fused = Fused(part * hidden, 2 * hidden)
        yield Row(f"blocks_{{i}}.mlp.{name}.kernel", f"{_LAYER}.ffn.w12.weight", fused)
    yield Row("blocks_{i}.mlp.down.kernel", f"{_LAYER}.ffn.w3.weight", "transpose")
    yield Row("final_norm.scale", "model.layer_norm.weight")


def read_neobert(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional={
            "intermediate_size": 3072,
            "norm_eps": 1e-6,
            "max_length": 1024,
            "tie_word_embeddings": False,  # of the head, which is not loaded
        },
        # What the authors' training code can do otherwise; no checkpoint of theirs does.
        fixed={"hidden_act": ("SwiGLU", "swiglu"), "rms_norm": (True,), "rope": (True,), "ngpt": (False,)},
        inert=_INERT,
    )
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = head_width(width, heads, place)
    # Two thirds, as a gated layer has three matrices, up to a multiple of 8.
    hidden = -(-int(2 * fields["intermediate_size"] / 3) // 8) * 8
    norm = NormKind("rms", fields["norm_eps"])
    rotary = rotary_from({}, place, head_dim=head_dim, max_length=fields["max_length"], theta=10000.0)
    rotary = replace(rotary, neighbors=True)
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, rotary)
    return EncoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["max_length"],
        blocks=(BlockSpec(attention, MLPSpec(hidden), norm),) * fields["num_hidden_layers"],
        learned_positions=False,
        embed_norm=None,
        final_norm=norm,
    )


NEOBERT = Family(
    "neobert",
    ENCODER,
    read_neobert,
    _rows,
    prefix="model.",
    unused=("decoder.*",),  # the masked-language-model head
)
