"""Qwen 2, 2.5 (biases on query, key and value) and 3 (norms on query and key heads instead)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import layer_types_of, read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_ROWS
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row

__all__ = ["QWEN2", "QWEN3"]

QWEN3_ROWS = (
    *LLAMA_ROWS,
    Row("blocks_{i}.attn.q_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("blocks_{i}.attn.k_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
)

_OPTIONAL: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def read_qwen2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_usual_fields(config, place, _OPTIONAL, {"hidden_act": ("silu", "swish")})
    return usual_decoder(fields, place, windows=_windows(fields, place), attention={"qkv_bias": True})


def read_qwen3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {**_OPTIONAL, "attention_bias": False, "head_dim": 128}
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")})
    return usual_decoder(
        fields,
        place,
        windows=_windows(fields, place),
        attention={
            "qkv_bias": fields["attention_bias"],
            "out_bias": fields["attention_bias"],
            "qk_norm": NormKind("rms", fields["rms_norm_eps"]),
        },
    )


def _windows(fields: Mapping[str, Any], place: str) -> tuple[int | None, ...]:
    """Where there is a window, it is that of the layers from `max_window_layers` on."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    default = [
        "sliding_attention" if window is not None and i >= fields["max_window_layers"] else "full_attention"
        for i in range(fields["num_hidden_layers"])
    ]
    return layer_types_of(fields["layer_types"], default, window, place)


QWEN2 = Family("qwen2", DECODER, read_qwen2, lambda _: LLAMA_ROWS, **LLAMA_FILES)
QWEN3 = Family("qwen3", DECODER, read_qwen3, lambda _: QWEN3_ROWS, **LLAMA_FILES)
