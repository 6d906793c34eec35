"""Tiny configs whose layers differ, one per way of saying so, and slices that move the layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.merging import Recipe

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "use_mamba_kernels": False,
}


def _of(model_type: str, without: Sequence[str] = (), **fields: Any) -> dict[str, Any]:
    config = {**_SIZES, "model_type": model_type, **fields}
    return {key: value for key, value in config.items() if key not in without}


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": _of("gemma2", sliding_window=3, query_pre_attn_scalar=12),
    "gemma3": _of("gemma3_text", sliding_window=3, query_pre_attn_scalar=12, sliding_window_pattern=3),
    "qwen2": _of("qwen2", ["head_dim"], use_sliding_window=True, sliding_window=3, max_window_layers=3),
    "qwen3": _of("qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=4),
    "mistral": _of("mistral", sliding_window=3),
    "ministral": _of("ministral", sliding_window=3),
    "smollm3": _of("smollm3", no_rope_layer_interval=3),
    "smollm3, windows": _of("smollm3", no_rope_layer_interval=3, use_sliding_window=True, sliding_window=3),
    "cohere2": _of("cohere2", sliding_window=3, sliding_window_pattern=3, logit_scale=1.0),
    "olmo3": _of("olmo3", sliding_window=3),
    "exaone4": _of("exaone4", sliding_window=3, sliding_window_pattern=3),
    "modernbert": _of(
        "modernbert",
        ["head_dim", "num_key_value_heads"],
        global_attn_every_n_layers=3,
        local_attention=4,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 6,
        "num_heads": 4,
        "window_size": 3,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 3]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_oss": _of("gpt_oss", sliding_window=3, num_local_experts=4, num_experts_per_tok=2),
    "llama4": _of(
        "llama4_text",
        no_rope_layer_interval=3,
        interleave_moe_layer_step=2,
        attention_chunk_size=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=40,
    ),
    "llama4, listed": _of(
        "llama4_text",
        no_rope_layers=[1, 1, 0, 1, 1, 0],
        moe_layers=[1, 3, 5],
        attention_chunk_size=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=40,
    ),
    "qwen2_moe": _of(
        "qwen2_moe",
        ["head_dim"],
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=4,
        decoder_sparse_step=2,
        shared_expert_intermediate_size=16,
        **_QWEN_EXPERTS,
    ),
    "qwen3_moe": _of("qwen3_moe", mlp_only_layers=[1], **_QWEN_EXPERTS),
    "qwen3_moe, every second": _of("qwen3_moe", mlp_only_layers=[3], decoder_sparse_step=2, **_QWEN_EXPERTS),
    "qwen3_next": _of(
        "qwen3_next",
        full_attention_interval=3,
        mlp_only_layers=[2],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
        **_QWEN_EXPERTS,
    ),
    "deepseek_v3": _of(
        "deepseek_v3",
        ["head_dim"],
        num_key_value_heads=4,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **_EXPERTS,
    ),
    "glm4_moe": _of("glm4_moe", first_k_dense_replace=1, **_EXPERTS),
    "ernie4_5_moe": _of("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "recurrent_gemma": _of(
        "recurrent_gemma",
        attention_window_size=3,
        lru_width=32,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "jamba": _of(
        "jamba",
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": _of("bamba", attn_layer_indices=[2, 4], **_MAMBA),
    "granitemoehybrid": _of(
        "granitemoehybrid",
        layer_types=["mamba", "attention", "mamba", "mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        **_MAMBA,
    ),
    "nemotron_h, pattern": _of("nemotron_h", hybrid_override_pattern="M-*M-E", **_NEMOTRON),
    "nemotron_h, list": _of(
        "nemotron_h",
        ["num_hidden_layers"],
        layers_block_type=["mamba", "mlp", "attention", "mamba", "mlp", "moe"],
        **_NEMOTRON,
    ),
    "lfm2": _of("lfm2", full_attn_idxs=[2, 4], block_multiple_of=8, conv_L_cache=3),
    "lfm2_moe": _of(
        "lfm2_moe", layer_types=["conv", "full_attention"] * 3, num_dense_layers=1, **_QWEN_EXPERTS
    ),
    "gemma3n": _of(
        "gemma3n_text",
        sliding_window=3,
        intermediate_size=[40, 40, 48, 48, 56, 56],
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 3,
        laurel_rank=8,
        altup_num_inputs=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=61,
    ),
}
SLICES = {name: ((0, 3), (2, 6)) for name in CONFIGS} | {"jamba": ((0, 6), (0, 3))}
"""Layers 0 1 2 2 3 4 5 of every model; of Jamba, whose layers have periods, 0 to 5 and 0 to 2."""


def order(name: str) -> list[int]:
    """The layer of the source that each layer of the output is."""
    return [i for start, stop in SLICES[name] for i in range(start, stop)]


def recipe(folder: Path | str, slices: Sequence[tuple[int, int]]) -> Recipe:
    """A recipe that stacks ranges of layers of one model."""
    return Recipe(
        merge_method="passthrough",
        slices=[{"sources": [{"model": str(folder), "layer_range": list(each)}]} for each in slices],
    )


def write_layers(folder: Path, config: dict[str, Any], count: int = 6, prefix: str = "model.layers.") -> Path:
    """A folder with a config and one number per layer in place of its weights."""
    from tests.merging.recipes import write_model

    tensors = {f"{prefix}{i}.mlp.weight": np.full((2, 2), i, np.float32) for i in range(count)}
    tensors |= {"model.embed_tokens.weight": np.zeros((3, 2), np.float32)}
    write_model(folder, tensors, config=config)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config."""
    return json.loads((folder / "config.json").read_text())
