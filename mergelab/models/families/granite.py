"""Granite 3: Llama that multiplies embeddings, scores, what layers add, and logits by constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_ROWS
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.model import Family

__all__ = ["GRANITE"]


def read_granite(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    bias = fields["attention_bias"]
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": bias, "out_bias": bias, "scale": fields["attention_multiplier"]},
        mlp=MLPSpec(fields["intermediate_size"], bias=fields["mlp_bias"]),
        block={"out_scale": fields["residual_multiplier"]},
        embed_scale=fields["embedding_multiplier"],
        logit_scale=1 / fields["logits_scaling"],
    )


GRANITE = Family("granite", DECODER, read_granite, lambda _: LLAMA_ROWS, **LLAMA_FILES)
