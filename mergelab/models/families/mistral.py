"""Mistral: Llama with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER
from mergelab.models.decoder_config import DecoderConfig
from mergelab.models.families.llama import LLAMA_ROWS, LLAMA_UNUSED
from mergelab.models.families.usual_fields import read_usual_fields, usual_decoder
from mergelab.models.family import Family

__all__ = ["MISTRAL"]


def read_mistral(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8}
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu",)})
    return usual_decoder(fields, place, windows=(fields["sliding_window"],) * fields["num_hidden_layers"])


MISTRAL = Family("mistral", DECODER, read_mistral, lambda _: LLAMA_ROWS, unused=LLAMA_UNUSED)
