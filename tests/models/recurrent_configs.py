"""Tiny models with recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["recurrent_configs"]


def recurrent_configs(sizes: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Their configs; `sizes` makes one of the usual fields and what differs."""
    delta = {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 3,
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
    }
    outside = {name: sizes()[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    outside |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "qwen3_next": sizes(
            model_type="qwen3_next",
            **delta,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
        ),
        "qwen3_5": sizes(
            model_type="qwen3_5_text", **{**delta, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
        ),
        "qwen3_5_moe": sizes(
            model_type="qwen3_5_moe_text",
            **{**delta, "linear_num_key_heads": 4, "attention_bias": True},
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
        ),
        "mamba": {
            **outside,
            "model_type": "mamba",
            "state_size": 5,
            "conv_kernel": 3,
            "use_bias": True,
            "time_step_rank": 3,
        },
        "mamba, untied, no biases": {
            **outside,
            "model_type": "mamba",
            "state_size": 4,
            "expand": 1,
            "use_conv_bias": False,
            "tie_word_embeddings": False,
        },
        "mamba2": {
            **outside,
            "model_type": "mamba2",
            "num_heads": 6,
            "head_dim": 8,
            "state_size": 5,
            "n_groups": 2,
            "conv_kernel": 3,
            "chunk_size": 4,
        },
        "mamba2, tied, biases, limited steps": {
            **outside,
            "model_type": "mamba2",
            "num_heads": 4,
            "head_dim": 12,
            "state_size": 4,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": [0.3, 0.8],
            "tie_word_embeddings": True,
        },
        "jamba": sizes(
            model_type="jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=0,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,  # with 5 float32 is off float64 by 4e-5 in transformers, too
            mamba_d_conv=3,
            mamba_dt_rank=4,
        ),
    }
