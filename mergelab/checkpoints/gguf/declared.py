"""Architectures whose keys are a plain table: each says once what is read and what is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergelab.errors import CheckpointError, quoted

__all__ = ["DECLARED", "Declared", "Key", "has_no_key"]


@dataclass(frozen=True)
class Key:
    """One key, behind the architecture's name, and the field of `config.json` that says the same.

    Attributes:
        key: key of the file.
        field: field of the config.
        form: whole number, float32 or switch.
        default: what the field is where a config does not say; None where it then has no key.
        required: whether a file must have the key.
    """

    key: str
    field: str
    form: Literal["I", "f", "bool"] = "I"
    default: Any = None
    required: bool = True


@dataclass(frozen=True)
class Declared:
    """What the files of one model type say beside the sizes of all.

    Attributes:
        model_class: class that transformers loads it with.
        keys: its keys.
        constants: fields that the format has no key for, with the values that llama.cpp computes; the first
            is what is read, and what a config means that does not say.
        seen: switches that are on where the file holds a tensor, by field.
        partial: fraction of a head that is rotated where a config does not say; None where heads are rotated
            whole.
        rotated: whether there are rotary positions at all.
        wide_heads: whether a head may be wider than its share of the stream.
        names: other names of the sizes: of `num_hidden_layers`, ...
        absent: keys of files that hold another model under the same architecture, and which.
        global_every: number of layers of which the last sees all tokens and the others a window, where
            llama.cpp knows no other order; None where layers are alike.
    """

    model_class: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)
    partial: float | None = None
    rotated: bool = True
    wide_heads: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    global_every: int | None = None


def has_no_key(place: str, name: str, value: Any) -> CheckpointError:
    """The error of a field that a GGUF file cannot say."""
    return CheckpointError(
        f"{place} has {name} = {quoted(value)}, for which a GGUF file of this architecture has no key; keep "
        "the model as a Hugging Face folder"
    )


_KV = Key("attention.head_count_kv", "num_key_value_heads")
_SILU: Mapping[str, Sequence[Any]] = {"hidden_act": ("silu", "swish")}
_Q_BIAS, _UP_BIAS = "blk.0.attn_q.bias", "blk.0.ffn_up.bias"


def _rms(default: float) -> Key:
    return Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f", default)


def _layer_norm(name: str) -> Key:
    return Key("attention.layer_norm_epsilon", name, "f", 1e-5)


DECLARED: Mapping[str, Declared] = {
    "olmo2": Declared(
        "Olmo2ForCausalLM",
        (_KV, _rms(1e-5)),
        {**_SILU, "attention_bias": (False,)},
        absent={"attention.sliding_window": "OLMo 3"},
    ),
    "granite": Declared(
        "GraniteForCausalLM",
        (
            _KV,
            _rms(1e-6),
            Key("attention.scale", "attention_multiplier", "f", 1.0, required=False),
            Key("embedding_scale", "embedding_multiplier", "f", 1.0, required=False),
            Key("residual_scale", "residual_multiplier", "f", 1.0, required=False),
            Key("logit_scale", "logits_scaling", "f", 1.0, required=False),
        ),
        _SILU,
        {"attention_bias": _Q_BIAS, "mlp_bias": _UP_BIAS},
    ),
    "starcoder2": Declared(
        "Starcoder2ForCausalLM",
        (
            Key("attention.head_count_kv", "num_key_value_heads", "I", 2),
            _layer_norm("norm_epsilon"),
            # llama.cpp sees all tokens whatever this says.
            Key("attention.sliding_window", "sliding_window", required=False),
        ),
        {"hidden_act": ("gelu_pytorch_tanh",)},
        {"use_bias": _Q_BIAS},
    ),
    "phi": Declared(
        "PhiForCausalLM",
        (_KV, _layer_norm("layer_norm_eps")),
        {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)},
        partial=0.5,
    ),
    "stablelm": Declared(
        "StableLmForCausalLM",
        (
            _KV,
            _layer_norm("layer_norm_eps"),
            Key("use_parallel_residual", "use_parallel_residual", "bool", False),
        ),
        {**_SILU, "qk_layernorm": (False,)},
        {"use_qkv_bias": _Q_BIAS},
        partial=0.25,
    ),
    "cohere": Declared(
        "CohereForCausalLM",
        (_KV, _layer_norm("layer_norm_eps"), Key("logit_scale", "logit_scale", "f", 0.0625)),
        _SILU,
        {"attention_bias": _Q_BIAS, "use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "cohere2": Declared(
        "Cohere2ForCausalLM",
        (
            _KV,
            _layer_norm("layer_norm_eps"),
            Key("logit_scale", "logit_scale", "f", 0.0625),
            Key("attention.sliding_window", "sliding_window", "I", 4096),
            Key("vocab_size", "vocab_size", required=False),
        ),
        {
            **_SILU,
            "attention_bias": (False,),
            "use_qk_norm": (False,),
            "sliding_window_pattern": (4,),
            "_sliding_window_pattern": (4, None),
        },
        global_every=4,
    ),
    "glm4": Declared(
        "Glm4ForCausalLM",
        (Key("attention.head_count_kv", "num_key_value_heads", "I", 2), _rms(1.5625e-07)),
        _SILU,
        {"attention_bias": _Q_BIAS},
        partial=0.5,
        wide_heads=True,
    ),
    "qwen2_moe": Declared(
        "Qwen2MoeForCausalLM",
        (
            Key("attention.head_count_kv", "num_key_value_heads", "I", 16),
            _rms(1e-6),
            Key("expert_count", "num_experts", "I", 60),
            Key("expert_used_count", "num_experts_per_tok", "I", 4),
            Key("expert_feed_forward_length", "moe_intermediate_size", "I", 1408),
            Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size", "I", 5632),
        ),
        {
            **_SILU,
            "norm_topk_prob": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "use_sliding_window": (False,),
        },
        {"qkv_bias": _Q_BIAS},
    ),
    "qwen3_moe": Declared(
        "Qwen3MoeForCausalLM",
        (
            Key("attention.head_count_kv", "num_key_value_heads", "I", 4),
            _rms(1e-6),
            Key("expert_count", "num_experts", "I", 128),
            Key("expert_used_count", "num_experts_per_tok", "I", 8),
            Key("expert_feed_forward_length", "moe_intermediate_size", "I", 768),
        ),
        {
            **_SILU,
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "use_sliding_window": (False,),
        },
        {"attention_bias": _Q_BIAS},
        wide_heads=True,
    ),
    "bloom": Declared(
        "BloomForCausalLM",
        (_layer_norm("layer_norm_epsilon"),),
        {"apply_residual_connection_post_layernorm": (False,)},
        rotated=False,
        names={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
        },
    ),
}
"""By model type."""
