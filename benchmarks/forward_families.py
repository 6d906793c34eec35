"""Small models of families of decoders, of one width and depth, for benchmarks/forward.py; their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "render_families"]

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    **_TOKENS,
}
_HEADS: dict[str, Any] = {**_SIZES, "num_key_value_heads": 4}
_WIDE: dict[str, Any] = {**_HEADS, "head_dim": 64}
# As many neurons at work for a token as the others have: four experts of eight, of a quarter of the width.
_EIGHT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 172}
_PLAIN: dict[str, Any] = {**_SIZES, "intermediate_size": 1024}
"""Of layers that are not gated: two matrices in place of three."""
_OLD: dict[str, Any] = {"vocab_size": 1024, "n_embd": 256, "n_layer": 4, "n_head": 4, **_TOKENS}


def _latent(**more: Any) -> dict[str, Any]:
    narrow = {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 172}
    shared = {"n_shared_experts": 1, "first_k_dense_replace": 1, "v_head_dim": 64}
    return {**_HEADS, **narrow, **experts, **shared, "n_group": 1, "topk_group": 1, **more}


FAMILIES: Mapping[str, dict[str, Any]] = {
    name: {"model_type": name, **shape}
    for name, shape in {
        "llama": _HEADS,
        "mistral": {**_HEADS, "sliding_window": 128},
        "mixtral": {**_HEADS, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 344},
        "qwen2": _HEADS,
        "qwen3": _WIDE,
        "qwen3_moe": {**_WIDE, **_EIGHT},
        "gpt_oss": {**_WIDE, "num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 172},
        "deepseek_v3": _latent(),
        "glm4_moe": {**_WIDE, **_latent(), "partial_rotary_factor": 0.5},
        "gemma": _WIDE,
        "gemma2": {**_WIDE, "sliding_window": 128},
        "gemma3_text": {**_WIDE, "sliding_window": 128},
        "gemma4_text": {
            **_WIDE,
            "global_head_dim": 64,
            "sliding_window": 128,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 1024,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "phi3": _HEADS,
        "olmo": _HEADS,
        "olmo2": _HEADS,
        "olmo3": {**_HEADS, "sliding_window": 128},
        "smollm3": _HEADS,
        "granite": _HEADS,
        "starcoder2": {**_PLAIN, "num_key_value_heads": 4},
        "phi": {**_PLAIN, "num_key_value_heads": 4},
        "stablelm": _HEADS,
        "cohere": _HEADS,
        "cohere2": {**_HEADS, "sliding_window": 128},
        "glm4": {**_WIDE, "partial_rotary_factor": 0.5},
        "opt": {**_SIZES, "ffn_dim": 1024, "word_embed_proj_dim": 256},
        "falcon": _SIZES,
        "bloom": {"vocab_size": 1024, "hidden_size": 256, "n_layer": 4, "n_head": 4, **_TOKENS},
        "gptj": {**_OLD, "rotary_dim": 32, "n_positions": 2048},
        "gpt2": {**_OLD, "n_positions": 2048},
        "gpt_neox": {**_PLAIN, "rotary_pct": 0.25},
        "mamba": {
            "vocab_size": 1024,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "state_size": 16,
            **_TOKENS,
        },
    }.items()
}
"""Configurations by the name of the family, Llama first."""


def render_families(results: Mapping[str, Any]) -> str:
    """The table: tokens a second of one pass, and how long a family takes for each second of Llama's.

    Time is divided by the number of parameters: 1 is what Llama of its size takes.
    """
    lines = [
        "| family | parameters | mergelab tokens/s | transformers tokens/s | ratio | "
        "time of Llama's size, mergelab | transformers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    programs = ("mergelab", "transformers")

    def seconds(model: Mapping[str, Any], program: str) -> float:
        return 1 / model["median"][program]["prefill"] / model["parameters"]

    llama = results["models"]["llama"]
    for name, model in results["models"].items():
        ours, theirs = (model["median"][program]["prefill"] for program in programs)
        costs = [f"{seconds(model, program) / seconds(llama, program):.2f}" for program in programs]
        lines.append(
            f"| {name} | {model['parameters'] / 1e6:.2f}M | {ours:,.0f} | {theirs:,.0f} | "
            f"{ours / theirs:.2f} | {costs[0]} | {costs[1]} |"
        )
    p = results["pass"]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    worst = max(model["largest_logit_difference"] for model in results["models"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {results['repeats']} turns, {p['dtype']}, one pass of {p['batch']} x {p['length']} "
            f"tokens; logits differ by {worst:.1e} at most. Time is divided by the number of parameters, of "
            "which models with experts use a part. "
            f"Load average of the machine at the start: {results['load']:.1f}. Machine: {machine}.",
        ]
    )
