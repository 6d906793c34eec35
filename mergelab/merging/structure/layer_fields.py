"""Which fields of a config give the layers of a model type their kinds: one entry per family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.merging.structure.hybrid_rules import (
    GEMMA3N,
    GEMMA4,
    GPT_NEO,
    KIMI,
    LFM2,
    NEMOTRON,
    ZAMBA,
    ZAMBA2,
    bailing_types,
    first_only,
    hybrids_in_order,
    lfm3_types,
    mimo_types,
    olmo_hybrid_types,
    recurrent_types,
    shared_keys,
    sparsity,
)
from mergelab.merging.structure.layer_kinds import (
    LayerField,
    LayerPart,
    index_field,
    offset_field,
    periodic,
    prefix_field,
    switched,
    type_field,
)
from mergelab.merging.structure.layer_rules import (
    DENSE,
    ERNIE,
    EXAONE,
    EXPERTS,
    FULL,
    INDEXERS,
    LINEAR,
    NO_ROPE,
    STEP,
    attention,
    dots1_types,
    interval,
    llama4_experts,
    llama4_types,
    ministral_types,
    mlp_types,
    no_window,
    qwen2_moe_types,
    smollm3_types,
    uniform,
    window_from,
)

__all__ = ["FAMILY_FIELDS", "layer_fields"]

_TEXT_WORDS = ("text", "llm", "language", "thinker", "encoder", "decoder")


def layer_fields(config: LayerPart, path: tuple[str, ...]) -> tuple[LayerField, ...]:
    """The fields that tell apart the layers which the part of a config at `path` describes.

    Those of its model type, and those that mean the same in every model type, where the part has them.
    """
    part: Any = config
    for key in path:
        part = part.get(key, {}) if isinstance(part, Mapping) else {}
    kind = part.get("model_type")
    if kind is None and path and any(word in path[-1] for word in _TEXT_WORDS):
        kind = config.get("model_type")
    own = FAMILY_FIELDS.get(str(kind).removesuffix("_text"), ())
    handled = {key for field in own for key in field.uses}
    shared = (
        field for field in _SHARED if field.name not in handled and part.get(field.name) not in (None, 0)
    )
    return (*own, *shared)


_MLLAMA = index_field(
    "cross_attention_layers",
    "cross-attention",
    "self-attention",
    default=lambda *_: frozenset({3, 8, 13, 18, 23, 28, 33, 38}),
)
_QWEN_MOE = (type_field(qwen2_moe_types, uses=("max_window_layers", "use_sliding_window")), STEP)

FAMILY_FIELDS: Mapping[str, tuple[LayerField, ...]] = {
    **dict.fromkeys(("gemma2", "vaultgemma", "t5gemma", "t5_gemma_module", "gpt_oss"), (attention(2),)),
    **dict.fromkeys(("gemma3", "t5gemma2", "t5gemma2_decoder"), (attention(6, "sliding_window_pattern"),)),
    "gemma3n": (
        GEMMA3N,
        shared_keys(15, GEMMA3N),
        type_field(sparsity, key="activation_sparsity_pattern"),
    ),
    **dict.fromkeys(("gemma4", "gemma4_unified"), (GEMMA4, shared_keys(0, GEMMA4))),
    "cohere2": (attention(4, "sliding_window_pattern"),),
    "olmo3": (attention(4),),
    "cwm": (attention(4, at=0),),
    "afmoe": (attention(4, "global_attn_every_n_layers"), prefix_field("num_dense_layers", 1)),
    **dict.fromkeys(
        ("modernbert", "modernbert-decoder"), (attention(3, "global_attn_every_n_layers", at=0),)
    ),
    **dict.fromkeys(("qwen2", "qwen3"), (window_from(28),)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), (window_from(80),)),
    **dict.fromkeys(("qwen2_5_omni", "qwen2_5_omni_talker"), (window_from(28),)),
    "qwen2_moe": _QWEN_MOE,
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe"), (STEP,)),
    "qwen3_next": (interval(), STEP),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), (interval(),)),
    "ministral": (type_field(ministral_types, uses=("sliding_window",)),),
    "smollm3": (
        NO_ROPE,
        type_field(smollm3_types, uses=("use_sliding_window", "sliding_window"), finish=no_window),
    ),
    "llama4": (
        NO_ROPE,
        type_field(llama4_types, uses=("attention_chunk_size",)),
        index_field("moe_layers", EXPERTS, DENSE, llama4_experts, ("interleave_moe_layer_step",)),
    ),
    "exaone4": (EXAONE,),
    "exaone_moe": (EXAONE, mlp_types(1)),
    "dots1": (
        type_field(dots1_types, uses=("max_window_layers", "sliding_window")),
        prefix_field("first_k_dense_replace", 0),
    ),
    "deepseek_v2": (prefix_field("first_k_dense_replace", 0),),
    "deepseek_v3": (prefix_field("first_k_dense_replace", 3),),
    **dict.fromkeys(("glm4_moe", "glm4v_moe"), (prefix_field("first_k_dense_replace", 1),)),
    "deepseek_v32": (type_field(uniform("indexed_attention")), mlp_types(3)),
    "glm_moe_dsa": (type_field(uniform("indexed_attention")), mlp_types(3), INDEXERS),
    **dict.fromkeys(("glm4_moe_lite", "ernie4_5_vl_moe", "hy_v3"), (mlp_types(1, None),)),
    "axk1": (mlp_types(1),),
    "ernie4_5_moe": (ERNIE,),
    "kimi_linear": (KIMI, mlp_types(1)),
    "bailing_hybrid": (type_field(bailing_types, uses=("layer_group_size",)), mlp_types(2)),
    "mimo_v2_flash": (type_field(mimo_types), mlp_types(1, None)),
    "minimax": (type_field(periodic(FULL, LINEAR, at=0, period=2)),),
    "olmo_hybrid": (type_field(olmo_hybrid_types),),
    "lfm2": (LFM2,),
    "lfm2_moe": (LFM2, prefix_field("num_dense_layers", 2)),
    "lfm3": (type_field(lfm3_types),),
    "recurrent_gemma": (
        LayerField(
            "block_types",
            recurrent_types,
            lambda part, kinds: part.update(block_types=list(kinds)),
            ("block_types", "layers_block_type", "layer_types"),
        ),
    ),
    "jamba": (
        offset_field("attn_layer_period", "attn_layer_offset", (8, 4), "attention", "mamba"),
        offset_field("expert_layer_period", "expert_layer_offset", (2, 1), EXPERTS, DENSE),
    ),
    "bamba": (index_field("attn_layer_indices", FULL, LINEAR),),
    "granitemoehybrid": (type_field(uniform(LINEAR), aliases=("layers_block_type",)),),
    "zamba": (ZAMBA, hybrids_in_order(ZAMBA, "shared_transf", strict=False)),
    "zamba2": (ZAMBA2, hybrids_in_order(ZAMBA2, "num_mem_blocks", strict=True)),
    "nemotron_h": (NEMOTRON,),
    "gpt_neo": (GPT_NEO,),
    "kolibri1": (attention(5),),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), (attention(4, at=0),)),
    "ultrabert": (attention(3),),
    **dict.fromkeys(
        ("inkling", "inkling2", "inkling2_loop"),
        (type_field(periodic("hybrid", "hybrid_sliding", at=-1, period=6)),),
    ),
    **dict.fromkeys(("diffusion_gemma", "embedding_gemma2"), (GEMMA4,)),
    "glm5_next": (
        type_field(periodic("indexed_attention", LINEAR, at=-1, period=4)),
        mlp_types(3),
        INDEXERS,
    ),
    "qwen4_exp": (interval("indexed_attention"),),
    **dict.fromkeys(("laguna", "axk2", "hy_v4", "hy_v4_vl"), (mlp_types(1, None),)),
    "unlimited_ocr": (mlp_types(1),),
    "step3p5": (mlp_types(3, None),),
    **dict.fromkeys(("mllama", "mllama_text_model"), (_MLLAMA,)),
    **dict.fromkeys(("t5", "mt5", "longt5", "pop2piano"), (first_only("relative_attention_bias"),)),
}
"""By model type, without the ending `_text`."""

# Fields that mean the same wherever they stand.
_SHARED = (
    STEP,
    *(prefix_field(key, 0) for key in ("first_k_dense_replace", "num_dense_layers", "n_dense_layers")),
    shared_keys(0, type_field(uniform(FULL))),
    LayerField(
        "scale_attn_by_inverse_layer_idx",
        lambda part, count: tuple(
            f"scaled by 1/{i + 1}" if switched(part, "scale_attn_by_inverse_layer_idx") else "not scaled"
            for i in range(count)
        ),
    ),
    *(
        index_field(key)
        for key in (
            "moe_layers",
            "full_attn_idxs",
            "attn_layer_indices",
            "cross_attention_layers",
            "fullatt_block_indexes",
            "window_block_indexes",
            "window_block_indices",
            "global_attn_indexes",
            "rope_scaling_layers",
        )
    ),
)
