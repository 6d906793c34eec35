"""SmolLM3: Llama whose every fourth layer is not rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import (
    layer_types_of,
    read_usual_fields,
    usual_decoder,
    usual_rotary,
)
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_ROWS
from mergelab.models.layers.mlp import MLPSpec
from mergelab.models.model import Family

__all__ = ["SMOLLM3"]


def read_smollm3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    }
    fixed = {"hidden_act": ("silu", "swish")}
    fields = read_usual_fields(config, place, optional, fixed, inert=("max_window_layers",))
    count, every = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    rotated = fields["no_rope_layers"]  # 1 for a layer that is rotated
    if rotated is None:
        rotated = [int((i + 1) % every != 0) for i in range(count)]
    if len(rotated) != count:
        raise CheckpointError(
            f"{place} has {len(rotated)} no_rope_layers for {count} layers; give one per layer."
        )
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    local = [window is not None and not rotates for rotates in rotated]
    default = ["sliding_attention" if one else "full_attention" for one in local]
    rotary, bias = usual_rotary(fields, place, 2e6), fields["attention_bias"]
    return usual_decoder(
        fields,
        place,
        rotary=[rotary if rotates else None for rotates in rotated],
        windows=layer_types_of(fields["layer_types"], default, fields["sliding_window"], place),
        attention={"qkv_bias": bias, "out_bias": bias},
        mlp=MLPSpec(fields["intermediate_size"], bias=fields["mlp_bias"]),
    )


SMOLLM3 = Family("smollm3", DECODER, read_smollm3, lambda _: LLAMA_ROWS, **LLAMA_FILES)
