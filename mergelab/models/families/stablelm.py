"""StableLM 2: Llama whose norms center and whose heads are rotated in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.families.starcoder2 import LLAMA_NORM_BIASES
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["STABLELM"]

_LAYER = "model.layers.{i}"
STABLELM_ROWS = llama_rows(
    *LLAMA_NORMS,
    *LLAMA_NORM_BIASES,
    *linear_rows("blocks_{i}", _LAYER, LLAMA_LINEAR),
    *(  # a norm for every head
        Row(f"blocks_{{i}}.attn.{name}_norm.scale", f"{_LAYER}.self_attn.{name}_layernorm.norms.{{e}}.weight")
        for name in "qk"
    ),
)


def read_stablelm(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    }
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    norm = NormKind("layer", fields["layer_norm_eps"])
    own = NormKind("layer", fields["layer_norm_eps"], biased=False) if fields["qk_layernorm"] else None
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": fields["use_qkv_bias"], "qk_norm": own, "qk_norm_over": "each"},
        block={"norm": norm, "placement": "joint" if fields["use_parallel_residual"] else "pre"},
    )


STABLELM = Family("stablelm", DECODER, read_stablelm, lambda _: STABLELM_ROWS, **LLAMA_FILES)
