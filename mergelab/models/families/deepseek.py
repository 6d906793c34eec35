"""DeepSeek V2 and V3 (R1): latent attention; dense first layers, then experts in groups and a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.expert_fields import (
    EXPERT_ROWS,
    check_experts,
    experts_in_layers,
    shared_rows,
)
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, LLAMA_NORMS, llama_rows
from mergelab.models.families.rotary_config import read_rotary, yarn_gain
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.latent_attention import LatentSpec
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows

__all__ = ["DEEPSEEK_V2", "DEEPSEEK_V3"]

_LAYER = "model.layers.{i}"
_ATTENTION = {
    "attn.q": "q_proj",
    "attn.q_down": "q_a_proj",
    "attn.q_up": "q_b_proj",
    "attn.kv_down": "kv_a_proj_with_mqa",
    "attn.kv_up": "kv_b_proj",
    "attn.o": "o_proj",
}
DEEPSEEK_ROWS = llama_rows(
    *LLAMA_NORMS,
    *linear_rows("blocks_{i}", f"{_LAYER}.self_attn", _ATTENTION),
    Row("blocks_{i}.attn.q_norm.scale", f"{_LAYER}.self_attn.q_a_layernorm.weight"),
    Row("blocks_{i}.attn.kv_norm.scale", f"{_LAYER}.self_attn.kv_a_layernorm.weight"),
    *linear_rows("blocks_{i}", _LAYER, {ours: hf for ours, hf in LLAMA_LINEAR.items() if "mlp" in ours}),
    *EXPERT_ROWS,
    *shared_rows("shared_experts"),
)

_OPTIONAL: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "attention_bias": False,
    "routed_scaling_factor": 1.0,
    "rope_interleave": True,
}
_INERT = ("ep_size", "moe_layer_freq", "num_nextn_predict_layers", "seq_aux", "aux_loss_alpha")
_INERT += ("qk_head_dim", "num_mtp_layers", "num_local_experts")  # say once more what other fields say


def read_deepseek_v2(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
    }
    fixed = {
        "hidden_act": ("silu", "swish"),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),
        "scoring_func": ("softmax",),
        "mlp_bias": (False,),
        "rope_interleave": (True,),
    }
    if config.get("num_experts_per_tok", 6) is None:  # the default of transformers, which runs nothing
        config = {**config, "num_experts_per_tok": 6}
    fields = read_usual_fields(config, place, optional, fixed, _INERT)
    if fields["topk_method"] == "greedy":
        fields |= {"n_group": None, "topk_group": None}
    return _decoder(fields, place, normalize=False)


def read_deepseek_v3(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        **_OPTIONAL,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    }
    fixed = {
        "hidden_act": ("silu", "swish"),
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
    }
    fields = read_usual_fields(config, place, optional, fixed, _INERT)
    return _decoder(fields, place, normalize=fields["norm_topk_prob"], scoring="sigmoid", correction=True)


def _decoder(fields: Mapping[str, Any], place: str, **routing: Any) -> DecoderConfig:
    heads, turned = fields["num_attention_heads"], fields["qk_rope_head_dim"]
    length, count = fields["max_position_embeddings"], fields["num_hidden_layers"]
    width = fields["qk_nope_head_dim"] + turned
    if fields["num_key_value_heads"] not in (None, heads):
        raise CheckpointError(
            f"{place} has {fields['num_key_value_heads']} key-value heads for {heads} heads, but in latent "
            "attention every head has its own; correct num_key_value_heads."
        )
    rotary = read_rotary(fields, place, head_dim=turned, max_length=length)
    attention = LatentSpec(
        n_heads=heads,
        q_rank=fields["q_lora_rank"],
        kv_rank=fields["kv_lora_rank"],
        plain=fields["qk_nope_head_dim"],
        turned=turned,
        value_dim=fields["v_head_dim"],
        # Scores are longer by what YaRN makes of the context, squared: once for queries and once for keys.
        scale=width**-0.5 * yarn_gain(fields) ** 2,
        rotary=replace(rotary, neighbors=fields["rope_interleave"]),
        bias=fields["attention_bias"],
    )
    experts = Experts(
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        groups=fields["n_group"] or 1,
        chosen_groups=fields["topk_group"] or fields["n_group"] or 1,
        weight_scale=fields["routed_scaling_factor"],
        precise=True,
        shared=fields["moe_intermediate_size"] * (fields["n_shared_experts"] or 0),
        **routing,
    )
    dense = usual_decoder({**fields, "head_dim": turned, "num_key_value_heads": heads}, place)
    blocks = [replace(block, attention=attention) for block in dense.blocks if isinstance(block, BlockSpec)]
    sparse = [i >= fields["first_k_dense_replace"] for i in range(count)]
    return experts_in_layers(replace(dense, blocks=tuple(blocks)), check_experts(experts, place), sparse)


DEEPSEEK_V2 = Family("deepseek_v2", DECODER, read_deepseek_v2, lambda _: DEEPSEEK_ROWS, **LLAMA_FILES)
DEEPSEEK_V3 = Family("deepseek_v3", DECODER, read_deepseek_v3, lambda _: DEEPSEEK_ROWS, **LLAMA_FILES)
