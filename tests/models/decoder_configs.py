"""Tiny configurations of decoders whose outputs stand in `decoder_outputs.json`."""

from __future__ import annotations

from typing import Any

# Ids that default configurations put beyond so small a vocabulary.
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_TOKENS,
}

DECODER_CONFIGS: dict[str, dict[str, Any]] = {
    # Phi-4-mini: three quarters of a head rotated, tied. The batch has rows on both sides of the threshold.
    "phi3, three quarters, longrope, tied": {
        **_SIZES,
        "model_type": "phi3",
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0]},
        "tie_word_embeddings": True,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
    },
    "opt": {**_SIZES, "model_type": "opt", "ffn_dim": 40},
    "opt, narrow embeddings, norms on the stream": {
        **_SIZES,
        "model_type": "opt",
        "ffn_dim": 40,
        "word_embed_proj_dim": 12,
        "do_layer_norm_before": False,
    },
    "falcon": {**_SIZES, "model_type": "falcon"},
    "falcon, new form, key heads": {
        **_SIZES,
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
        "ffn_hidden_size": 40,
        "rope_theta": 500.0,
    },
    "falcon, new form, one norm": {
        **_SIZES,
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "falcon, linear biases": {
        **_SIZES,
        "model_type": "falcon",
        "num_attention_heads": 6,  # no power of 2
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": 61,
        "hidden_size": 24,
        "n_layer": 2,
        "n_head": 6,
        **_TOKENS,
    },
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "rotary_dim": 4,
        **_TOKENS,
    },
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": 61,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 32,
        "window_size": 3,
        "attention_types": [[["global", "local"], 1]],
        **_TOKENS,
    },
    "gemma4": {
        **_SIZES,
        "model_type": "gemma4_text",
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 12,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 100.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma4, experts": {
        **_SIZES,
        "model_type": "gemma4_text",
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
}
