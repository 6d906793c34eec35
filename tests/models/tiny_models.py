"""Tiny models of every family: `config.json`, weights from a formula, tokens padded on both sides."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from mergelab.models.table import stored_shapes, tree_from_leaves
from tests.models.recurrent_configs import recurrent_configs

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Token ids that the default configurations of transformers put beyond so small a vocabulary.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def sizes(**changes: Any) -> dict[str, Any]:
    return {**_SIZES, **changes}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": sizes(model_type="llama", rms_norm_eps=1e-5),
    "llama, one key head, tied, biases": sizes(
        model_type="llama",
        num_key_value_heads=1,
        head_dim=10,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama, linear scaling": sizes(
        model_type="llama", num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "llama 3 scaling": sizes(
        model_type="llama",
        head_dim=12,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, yarn": sizes(
        model_type="llama",
        head_dim=12,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        },
    ),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2, scores by layer": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "gpt_neox": sizes(model_type="gpt_neox", hidden_size=32, rotary_pct=0.5, num_key_value_heads=None),
    "gpt_neox, sequential": sizes(
        model_type="gpt_neox",
        hidden_size=32,
        num_key_value_heads=None,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    ),
    "mistral": sizes(model_type="mistral", sliding_window=3),
    "mixtral": sizes(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, rope_theta=1e4),
    "qwen2": sizes(
        model_type="qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1, rope_theta=1e6
    ),
    "qwen2, both directions": sizes(
        model_type="qwen2",
        is_causal=False,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
        rope_theta=1e6,
    ),
    "qwen3": sizes(model_type="qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma2": sizes(
        model_type="gemma2",
        head_dim=8,
        sliding_window=3,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": sizes(
        model_type="gemma3_text",
        head_dim=8,
        sliding_window=3,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention"],
        rope_theta=1e5,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3, both directions": sizes(
        model_type="gemma3_text",
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    ),
    "phi3": sizes(model_type="phi3", sliding_window=4),
    "phi3, longrope": sizes(
        model_type="phi3",
        # Rows longer than this use the long factors; the batch below has shorter and longer ones.
        original_max_position_embeddings=8,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0]},
    ),
    "phi3, partly rotated": sizes(
        model_type="phi3", num_attention_heads=3, num_key_value_heads=3, partial_rotary_factor=0.5
    ),
    "gemma": sizes(model_type="gemma", head_dim=8, hidden_act="gelu"),
    "olmo": sizes(model_type="olmo", clip_qkv=1.5),
    "olmo2": sizes(model_type="olmo2"),
    "olmo3": sizes(
        model_type="olmo3",
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
        rope_theta=5e5,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "attention_factor": 1.2,
        },
    ),
    "smollm3": sizes(model_type="smollm3", no_rope_layers=[1, 0], rope_theta=100.0),
    "granite": sizes(
        model_type="granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "starcoder2": sizes(model_type="starcoder2", sliding_window=4),
    "phi": sizes(model_type="phi", hidden_size=32, partial_rotary_factor=0.5),
    "phi, normalized heads": sizes(
        model_type="phi", hidden_size=32, num_key_value_heads=4, partial_rotary_factor=0.5, qk_layernorm=True
    ),
    "stablelm": sizes(model_type="stablelm", hidden_size=64, use_qkv_bias=True),
    "stablelm, parallel": sizes(
        model_type="stablelm", hidden_size=64, use_parallel_residual=True, qk_layernorm=True
    ),
    "cohere": sizes(model_type="cohere", logit_scale=0.5),
    "cohere, normalized heads": sizes(
        model_type="cohere", use_qk_norm=True, attention_bias=True, logit_scale=0.5, rope_theta=100.0
    ),
    "cohere2": sizes(
        model_type="cohere2",
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
        rope_theta=100.0,
    ),
    "glm": sizes(model_type="glm", head_dim=8),
    "glm4": sizes(model_type="glm4", head_dim=8, attention_bias=False),
    "qwen3_moe": sizes(
        model_type="qwen3_moe",
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "qwen2_moe": sizes(
        model_type="qwen2_moe",
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
        decoder_sparse_step=2,
    ),
    "gpt_oss": sizes(
        model_type="gpt_oss",
        head_dim=8,
        sliding_window=3,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=16,
        swiglu_limit=0.7,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    ),
    "deepseek_v2": sizes(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        first_k_dense_replace=1,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=2,
        n_group=3,
        topk_group=1,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.7,
        norm_topk_prob=False,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "mscale": 0.9,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 16,
        },
    ),
    "deepseek_v3": sizes(
        model_type="deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=1,
        routed_scaling_factor=2.5,
    ),
    "glm4_moe": sizes(
        model_type="glm4_moe",
        head_dim=8,
        use_qk_norm=True,
        attention_bias=True,
        n_routed_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
    ),
    **recurrent_configs(sizes),
    "bert": sizes(model_type="bert", num_key_value_heads=None, type_vocab_size=2),
}
for _config in CONFIGS.values():
    if _config.get("num_key_value_heads", 0) is None:
        del _config["num_key_value_heads"]

TOKENS = np.random.default_rng(0).integers(3, 61, (3, 10)).astype(np.int32)
# The first row is full, the second padded on the left, the third on the right.
MASK = np.array([[1] * 10, [0] * 3 + [1] * 7, [1] * 6 + [0] * 4], bool)


def weights(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """HF tensors, each a function of its name; large enough that attention is far from uniform."""
    found = {}
    for name, shape in stored_shapes(model.table()).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
        norm = "norm" in name.lower() or ".ln_" in name
        array = rng.normal(0.0, 0.4 if len(shape) > 1 or norm else 0.2, shape)
        found[name] = (array + (norm and name.endswith("weight"))).astype(np.float32)
    return found


def params_of(model: Model, tensors: dict[str, np.ndarray]) -> Params:
    """The parameter tree that HF tensors make, through the family's table."""
    return tree_from_leaves(
        {leaf: jnp.asarray(leaf.forward([tensors[n] for n in leaf.hf_names])) for leaf in model.table()}
    )


def tiny(name: str) -> tuple[Model, Params]:
    """A model of `CONFIGS` with the weights of the formula."""
    model = model_from_config(CONFIGS[name])
    return model, params_of(model, weights(model))


def write(folder: Path, name: str) -> Path:
    """Writes a model of `CONFIGS` as an HF folder."""
    model = model_from_config(CONFIGS[name])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file(weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
