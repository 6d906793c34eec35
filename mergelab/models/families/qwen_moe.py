"""Qwen 2 and 3 with experts: an expert that sees every token, gated (2); norms of query and key heads (3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import layer_types_of, read_usual_fields, usual_decoder
from mergelab.models.families.expert_fields import (
    EXPERT_ROWS,
    check_experts,
    experts_in_layers,
    shared_rows,
)
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_ROWS
from mergelab.models.families.qwen import QWEN3_ROWS
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Row

__all__ = ["QWEN2_MOE", "QWEN3_MOE", "qwen_experts"]

QWEN2_MOE_ROWS = (
    *LLAMA_ROWS,
    *EXPERT_ROWS,
    *shared_rows("shared_expert"),
    Row("blocks_{i}.mlp.shared_gate.kernel", "model.layers.{i}.mlp.shared_expert_gate.weight", "transpose"),
)
QWEN3_MOE_ROWS = (*QWEN3_ROWS, *EXPERT_ROWS)

_OPTIONAL: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
_FIXED: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}


def read_qwen2_moe(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "max_window_layers": 28,
        "layer_types": None,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }
    if config.get("sliding_window") == 0:  # how transformers writes that there is none
        config = {**config, "sliding_window": None}
    fields = read_usual_fields(config, place, optional, _FIXED)
    count = fields["num_hidden_layers"]
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    local = [window is not None and i % 2 == 0 and i < fields["max_window_layers"] for i in range(count)]
    default = ["sliding_attention" if one else "full_attention" for one in local]
    dense = usual_decoder(
        fields,
        place,
        windows=layer_types_of(fields["layer_types"], default, window, place),
        attention={"qkv_bias": fields["qkv_bias"]},
    )
    shared = fields["shared_expert_intermediate_size"]
    return qwen_experts(dense, fields, place, shared=shared, shared_gate=True)


def read_qwen3_moe(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "num_experts": 128,
        "num_local_experts": None,  # as transformers 5 writes it
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    fields = read_usual_fields(config, place, optional, _FIXED, inert=("max_window_layers",))
    bias = fields["attention_bias"]
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    dense = usual_decoder(
        fields,
        place,
        windows=(window,) * fields["num_hidden_layers"],
        attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": NormKind("rms", fields["rms_norm_eps"])},
    )
    return qwen_experts(dense, fields, place)


def qwen_experts(dense: DecoderConfig, fields: Mapping[str, Any], place: str, **others: Any) -> DecoderConfig:
    """Experts in every `decoder_sparse_step`-th layer but those that are said to have none.

    Raises:
        CheckpointError: a layer that has none is none of the layers, or more are chosen than there are.
    """
    count, only = fields["num_hidden_layers"], fields["mlp_only_layers"] or []
    if any(layer >= count for layer in only):
        raise CheckpointError(
            f"{place} has mlp_only_layers up to {max(only)}, but {count} layers, numbered from 0; correct it."
        )
    step = fields["decoder_sparse_step"]
    experts = Experts(
        fields.get("num_local_experts") or fields["num_experts"],
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        normalize=fields["norm_topk_prob"],
        **others,
    )
    sparse = [i not in only and (i + 1) % step == 0 for i in range(count)]
    return experts_in_layers(dense, check_experts(experts, place), sparse)


QWEN2_MOE = Family("qwen2_moe", DECODER, read_qwen2_moe, lambda _: QWEN2_MOE_ROWS, **LLAMA_FILES)
QWEN3_MOE = Family("qwen3_moe", DECODER, read_qwen3_moe, lambda _: QWEN3_MOE_ROWS, **LLAMA_FILES)
