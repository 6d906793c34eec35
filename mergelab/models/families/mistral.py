"""Mistral and Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, LLAMA_ROWS, llama_rows
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["MISTRAL", "MIXTRAL"]


def read_mistral(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8}
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    return usual_decoder(fields, place, windows=(fields["sliding_window"],) * fields["num_hidden_layers"])


MISTRAL = Family("mistral", DECODER, read_mistral, lambda _: LLAMA_ROWS, **LLAMA_FILES)


_LAYER, _MOE = "model.layers.{i}", "model.layers.{i}.block_sparse_moe"

MIXTRAL_ROWS = llama_rows(
    *LLAMA_NORMS,
    *linear_rows("blocks_{i}", _LAYER, {ours: hf for ours, hf in LLAMA_LINEAR.items() if "attn" in ours}),
    Row("blocks_{i}.mlp.router", f"{_MOE}.gate.weight", "transpose"),
    Row("blocks_{i}.mlp.gate", f"{_MOE}.experts.{{e}}.w1.weight", "transpose"),
    Row("blocks_{i}.mlp.down", f"{_MOE}.experts.{{e}}.w2.weight", "transpose"),
    Row("blocks_{i}.mlp.up", f"{_MOE}.experts.{{e}}.w3.weight", "transpose"),
)


def read_mixtral(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    experts, chosen = fields["num_local_experts"], fields["num_experts_per_tok"]
    if chosen > experts:
        raise CheckpointError(f"{place} chooses {chosen} of {experts} experts; correct one of the two.")
    return usual_decoder(
        fields,
        place,
        theta=1e6,
        windows=(fields["sliding_window"],) * fields["num_hidden_layers"],
        mlp=Experts(experts, chosen, fields["intermediate_size"]),
    )


MIXTRAL = Family("mixtral", DECODER, read_mixtral, lambda _: MIXTRAL_ROWS, **LLAMA_FILES)
