"""GLM-4.5 (`glm4_moe`): partly rotated heads; a dense first layer, then experts and a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.expert_fields import (
    EXPERT_ROWS,
    check_experts,
    experts_in_layers,
    shared_rows,
)
from mergelab.models.families.llama import LLAMA_FILES
from mergelab.models.families.qwen import QWEN3_ROWS
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family

__all__ = ["GLM4_MOE"]

GLM4_MOE_ROWS = (*QWEN3_ROWS, *EXPERT_ROWS, *shared_rows("shared_experts"))


def read_glm4_moe(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }
    inert = ("num_nextn_predict_layers", "num_mtp_layers", "num_local_experts")
    fields = read_usual_fields(config, place, optional, {"hidden_act": ("silu", "swish")}, inert)
    norm = NormKind("rms", fields["rms_norm_eps"]) if fields["use_qk_norm"] else None
    dense = usual_decoder(fields, place, attention={"qkv_bias": fields["attention_bias"], "qk_norm": norm})
    experts = Experts(
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        normalize=fields["norm_topk_prob"],
        scoring="sigmoid",
        groups=fields["n_group"] or 1,
        chosen_groups=fields["topk_group"] or 1,
        weight_scale=fields["routed_scaling_factor"],
        correction=True,
        precise=True,
        shared=fields["moe_intermediate_size"] * (fields["n_shared_experts"] or 0),
    )
    sparse = [i >= fields["first_k_dense_replace"] for i in range(fields["num_hidden_layers"])]
    return experts_in_layers(dense, check_experts(experts, place), sparse)


GLM4_MOE = Family("glm4_moe", DECODER, read_glm4_moe, lambda _: GLM4_MOE_ROWS, **LLAMA_FILES)
