"""What is known of the fields of `config.json` by name: the kind of their values, and which say nothing here.

A field stands in one of four places. What a family reads, with its default, and what it computes for one
value only, the family says itself. What says nothing of a forward pass in any family stands here, taken from
`PretrainedConfig` and `GenerationConfig` of transformers (versions 4.31 to 5.24) and from what trainers and
quantizers write beside it; what says nothing in one family alone, that family's `inert` adds. All else is
unknown: transformers ignores it, and so does `read_fields`, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "FIXED",
    "INERT",
    "INERT_WHEN_OFF",
    "LAYER_NUMBERS",
    "LISTS",
    "MAPPINGS",
    "MAX_LAYERS",
    "NULLABLE",
    "NUMBERS",
    "SIZES",
    "SWITCHES",
    "is_inert",
]

MAX_LAYERS = 10_000
"""Layers a config may claim; what its weights hold is compared once they are open (`Model.for_tensors`)."""

_MAX = 2**31 - 1
SIZES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, MAX_LAYERS)),
    **dict.fromkeys(
        (
            "num_local_experts",
            "num_experts_per_tok",
            "num_experts",
            "n_routed_experts",
            "n_group",
            "topk_group",
        ),
        (1, 2**16),
    ),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace"), (0, 2**16)),
    **dict.fromkeys(
        ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers"), (0, _MAX)
    ),
    **dict.fromkeys(("max_window_layers", "pad_token_id", "type_vocab_size"), (0, _MAX)),
    **dict.fromkeys(("max_relative_positions", "position_buckets"), (-1, _MAX)),
    "conv_kernel_size": (0, 2**8),
    # A convolution over time is a sum that is written out tap by tap; real ones have four.
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv"), (1, 2**8)),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), (0, MAX_LAYERS)),
    **dict.fromkeys(
        (
            *("attn_layer_period", "expert_layer_period"),
            *("expand", "n_groups", "state_size", "time_step_rank"),
            *("mamba_d_state", "mamba_dt_rank", "mamba_expand"),
        ),
        (1, 2**24),
    ),
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "sliding_window",
            "sliding_window_pattern",
            "no_rope_layer_interval",
            "_sliding_window_pattern",
            "dim",
            "global_attn_every_n_layers",
            "hidden_dim",
            "local_attention",
            "max_length",
            "n_heads",
            "num_channels",
            "projection_dim",
            "relative_attention_num_buckets",
            "n_embd",
            "n_head",
            "n_inner",
            "n_positions",
            "n_ctx",
            "decoder_sparse_step",
            "full_attention_interval",
            "kv_lora_rank",
            "linear_key_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_value_head_dim",
            "moe_intermediate_size",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "shared_expert_intermediate_size",
            "v_head_dim",
            "ffn_dim",
            "word_embed_proj_dim",
            "ffn_hidden_size",
            "num_kv_heads",
            "num_ln_in_parallel_attn",
            "seq_length",
            "num_heads",
            "attention_chunk_size",
            "floor_scale",
            "global_head_dim",
            "num_global_key_value_heads",
            "top_k_experts",
            "interleave_moe_layer_step",
            "intermediate_size_mlp",
            "rotary_dim",
            "window_size",
        ),
        (1, _MAX),
    ),
}
"""Whole numbers, with the least and the largest they may be."""

NUMBERS = frozenset(
    {
        "attention_multiplier",
        "attn_scale",
        "attn_logit_softcapping",
        "clip_qkv",
        "embedding_multiplier",
        "final_logit_softcapping",
        "global_rope_theta",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "logit_scale",
        "local_rope_theta",
        "logits_scaling",
        "norm_eps",
        "norm_epsilon",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "routed_scaling_factor",
        "swiglu_limit",
        "rms_norm_eps",
        "rope_local_base_freq",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
    }
)
SWITCHES = frozenset(
    {
        "_remove_final_layer_norm",
        "alibi",
        "attention_bias",
        "attention_k_eq_v",
        "attn_temperature_tuning",
        "bias",
        "do_layer_norm_before",
        "enable_bias",
        "enable_moe_block",
        "use_double_wide_mlp",
        "is_causal",
        "layer_norm_elementwise_affine",
        "multi_query",
        "new_decoder_architecture",
        "parallel_attn",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "mlp_bias",
        "norm_bias",
        "norm_topk_prob",
        "position_biased_input",
        "qk_layernorm",
        "qkv_bias",
        "relative_attention",
        "rope_interleave",
        "share_att_key",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "tie_word_embeddings",
        "use_bias",
        "use_bidirectional_attention",
        "use_conv_bias",
        "use_parallel_residual",
        "use_qk_norm",
        "use_qkv_bias",
        "use_sliding_window",
    }
)
MAPPINGS = frozenset({"per_layer_config", "rope_parameters", "rope_scaling"})
LISTS = frozenset({"layer_types"})
LAYER_NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "no_rope_layers"})
"""Lists of whole numbers: one for each layer, or the numbers of some layers."""
NULLABLE = frozenset(
    {
        "attention_chunk_size",
        "attn_logit_softcapping",
        "clip_qkv",
        "final_logit_softcapping",
        "head_dim",
        "n_group",
        "n_shared_experts",
        "num_key_value_heads",
        "q_lora_rank",
        "topk_group",
        "sliding_window",
        "sliding_window_pattern",
        "tie_word_embeddings",
        "use_bidirectional_attention",
    }
)
"""Fields that transformers writes as null though their default is something else."""

FIXED: Mapping[str, Sequence[Any]] = {
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
}
"""Fields that change the pass of any family, with the values that do not."""

_TOKENS = {
    "begin_suppress_tokens",
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "mask_token_id",
    "pad_token_id",
    "sep_token_id",
    "suppress_tokens",
    "tokenizer_class",
    "unk_token_id",
}
_TRAINING = {
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "initializer_range",
    "loss_type",
    "neftune_noise_alpha",
    "output_router_logits",
    "pretraining_tp",
    "resid_pdrop",
    "residual_dropout",
    "rotary_emb_fraction",
    "router_aux_loss_coef",
    "router_jitter_noise",
}
_HEADS = {
    "_num_labels",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "problem_type",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
}
_GENERATION = {
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bad_words_ids",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "disable_compile",
    "diversity_penalty",
    "do_sample",
    "dola_layers",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "guidance_scale",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "sequence_bias",
    "speculation_type",
    "stop_strings",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
    "use_mtp",
    "watermarking_config",
}
_EXECUTION = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_flash_attn_2_enabled",
    "_output_attentions",
    "attn_implementation",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "chunk_size_feed_forward",
    "experts_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "tf_legacy_loss",
    "tie_last_hidden_states",
    "torchscript",
    "use_bfloat16",
    "use_flash_attention",
    "use_flash_attn",
    "use_return_dict",
    "xla_device",
}
_ORIGIN = {
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "adapters",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "is_llama_config",
    "model_max_length",
    "model_name",
    "name_or_path",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
}
_STORAGE = {
    # How the weights are stored: the files decide what can be read.
    "compression_config",
    "quantization",
    "quantization_config",
}
_ENCODER_DECODER = {
    # A dump of `to_dict()` says of every model what it would be in an encoder-decoder pair.
    "add_cross_attention",
    "cross_attention_hidden_size",
    "is_decoder",
    "is_encoder_decoder",
    "tie_encoder_decoder",
}
_CONTEXT = {
    # What other programs take for the longest text; the model's own is `max_position_embeddings`.
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "use_mrope",  # positions of images; those of text are the same
}
INERT = frozenset().union(
    _TOKENS,
    _TRAINING,
    _HEADS,
    _GENERATION,
    _EXECUTION,
    _ORIGIN,
    _STORAGE,
    _ENCODER_DECODER,
    _CONTEXT,
)
"""Fields that say nothing of a forward pass, whatever their value, in any family that does not read them."""

INERT_WHEN_OFF = frozenset(
    {
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "full_attn_mod",
        "head_dim",
        "interpolate_factor",
        "layer_types",
        "lm_head_bias",
        "mlp_bias",
        "partial_rotary_factor",
        "qk_layernorm",
        "qkv_bias",
        "rope_interleaved",
        "rope_parameters",
        "rope_scaling",
        "sliding_window",
        "use_bidirectional_attention",
        "use_qk_norm",
        "use_sliding_window",
    }
)
"""Fields of other families: here they say nothing either, which is worth a warning unless they are off."""


def is_inert(name: str, value: Any) -> bool:
    """Whether a field that the family does not read may be passed over in silence."""
    off = value is None or value is False or (type(value) is int and value == 1)
    return name in INERT or name.startswith("unsloth_") or (name in INERT_WHEN_OFF and off)
