"""Models that also see or hear, read as their text tower: a wrapper's `text_config` as a config of its own.

For text alone, the tower of these wrappers computes what a model of its family does: rotary positions in
three directions (Qwen2-VL, arXiv:2409.12191) are equal, and masks that let the tokens of an image see each
other open nothing. A wrapper's `config.json` omits from `text_config` what equals the default of its class in
transformers, so those defaults stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, quoted

__all__ = ["WRAPPERS", "text_config", "text_family", "without_images"]

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_QWEN = {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_QWEN_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
_TOWERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "intermediate_size": 14336}),
    "qwen2": ("qwen2", _QWEN),
    "qwen2_5_vl_text": ("qwen2", _QWEN_VL),
    "qwen2_vl_text": ("qwen2", _QWEN_VL),
    "qwen3": ("qwen3", _QWEN),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {}),
    "qwen3_5_text": ("qwen3_5_text", {}),
}
"""By the `model_type` of a text_config: the family that computes it, and the defaults of its class."""

WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "vipllava": "llama",
}
"""Wrappers by `model_type`, and what their text tower is where they do not say."""

_MISTRAL3 = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
}
"""What Mistral 3 is where it has no text_config at all."""

_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
_SHARED = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype")
"""Fields of the wrapper that speak of its text tower."""

_OTHERS = ("vision_config", "audio_config", "text_config", "vision_start_token_id", "vision_end_token_id")
_OTHERS += ("vision_token_id", "image_token_id", "video_token_id", "audio_token_id", "auto_map")
"""Fields of flat wrappers, whose text fields stand beside them, that do not speak of the text tower."""


def text_family(config: Mapping[str, Any]) -> str | None:
    """The family of a wrapper's text tower; None where the config is not that of a known wrapper."""
    kind, given = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return None
    tower = given.get("model_type") if isinstance(given, Mapping) else None
    family = _TOWERS.get(tower if isinstance(tower, str) else WRAPPERS[kind])
    return None if family is None else family[0]


def text_config(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], str] | None:
    """The config of a wrapper's text tower as that of a model of its own, and its place for messages.

    None where the config is not that of a known wrapper. What makes positions of images drops out; token ids,
    dtype and the tying of the head may stand in the wrapper.

    Raises:
        CheckpointError: the text tower is of an unsupported kind, or not an object.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return None
    given = config.get("text_config")
    if given is None and "vision_config" in config:
        given = {name: value for name, value in config.items() if name not in _OTHERS}
        given["model_type"] = WRAPPERS[kind]
    elif given is None:
        given = dict(_MISTRAL3) if kind == "mistral3" else {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{place} has text_config = {quoted(given)}, but expected an object.")
    tower = given.get("model_type") or WRAPPERS[kind]
    if not isinstance(tower, str) or tower not in _TOWERS:
        raise CheckpointError(
            f"{place}: the text_config of this {kind!r} model has model_type {quoted(tower)}, but the text "
            f"towers supported here are {', '.join(map(repr, _TOWERS))}; the model cannot be run here."
        )
    family, defaults = _TOWERS[tower]
    outer = {name: config[name] for name in _SHARED if config.get(name) is not None}
    inner = {name: value for name, value in given.items() if name not in _OTHERS and value is not None}
    nulls = {name: None for name, value in given.items() if name not in _OTHERS and value is None}
    merged: dict[str, Any] = {**defaults, **nulls, **outer, **inner, "model_type": family}
    if outer.get("tie_word_embeddings") is True:  # the head is the wrapper's
        merged["tie_word_embeddings"] = True
    merged.setdefault("architectures", [_CLASSES[family]])
    return without_images(merged), f"{place} (text_config)"


def without_images(config: dict[str, Any]) -> dict[str, Any]:
    """The config, which is changed, with the positions that text has."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if not isinstance(rope, Mapping) or "mrope_section" not in rope:
            continue
        kept = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        for key in ("type", "rope_type"):
            if kept.get(key) in ("mrope", "default"):
                kept.pop(key)
        config[name] = {"rope_type": "default", **kept} if kept else None
    return config
