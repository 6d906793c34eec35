"""StarCoder 2: norms that center, layers that are not gated, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["LLAMA_NORM_BIASES", "STARCODER2"]

LLAMA_NORM_BIASES = (
    Row("blocks_{i}.attn_norm.bias", "model.layers.{i}.input_layernorm.bias"),
    Row("blocks_{i}.mlp_norm.bias", "model.layers.{i}.post_attention_layernorm.bias"),
    Row("final_norm.bias", "model.norm.bias"),
)
_LINEAR = {ours: hf for ours, hf in LLAMA_LINEAR.items() if "attn" in ours}
STARCODER2_ROWS = llama_rows(
    *LLAMA_NORMS,
    *LLAMA_NORM_BIASES,
    *linear_rows(
        "blocks_{i}", "model.layers.{i}", {**_LINEAR, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    ),
)


def read_starcoder2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "intermediate_size": 12288,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": None,
        "use_bias": True,
        "tie_word_embeddings": True,
    }
    # The first files repeat what is the only form: norms that center, layers that are not gated.
    fixed = {
        "hidden_act": tuple(ACTIVATIONS),
        "norm_type": ("layer_norm",),
        "mlp_type": ("default",),
    }
    fields = read_usual_fields(config, place, optional, fixed, inert=("layer_norm_epsilon",))
    bias = fields["use_bias"]
    return usual_decoder(
        fields,
        place,
        windows=(fields["sliding_window"],) * fields["num_hidden_layers"],
        attention={"qkv_bias": bias, "out_bias": bias},
        mlp=MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=bias),
        block={"norm": NormKind("layer", fields["norm_epsilon"])},
    )


STARCODER2 = Family("starcoder2", DECODER, read_starcoder2, lambda _: STARCODER2_ROWS, **LLAMA_FILES)
