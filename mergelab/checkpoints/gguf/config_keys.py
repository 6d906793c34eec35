"""The keys of a GGUF file for a `config.json`, and the tensors that hold numbers of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergelab.checkpoints.gguf.config import LAYERS_OF_27B, llama3_factors
from mergelab.checkpoints.gguf.declared import DECLARED, has_no_key
from mergelab.checkpoints.gguf.header import Typed

__all__ = ["folded_from", "metadata_from"]

_THETA = {"mixtral": 1e6, "gemma3_text": 1e6}  # where a config names none


def metadata_from(config: Mapping[str, Any], architecture: str, place: str) -> dict[str, Any]:
    """The keys of a GGUF file for a `config.json`; the inverse of `config_from`.

    Args:
        config: the fields.
        architecture: the name of the architecture in the file.
        place: the config's path, for messages.

    Raises:
        CheckpointError: it has what the format has no key for.
    """
    kind, found = config["model_type"], dict[str, Any]()

    def put(key: str, form: str, value: Any) -> None:
        if value is not None:
            found[f"{architecture}.{key}"] = Typed(form, value)

    if kind == "gpt2":
        width = config["n_embd"]
        put("context_length", "I", config.get("n_positions", 1024))
        put("embedding_length", "I", width)
        put("block_count", "I", config["n_layer"])
        put("feed_forward_length", "I", config.get("n_inner") or 4 * width)
        put("attention.head_count", "I", config["n_head"])
        put("attention.layer_norm_epsilon", "f", config.get("layer_norm_epsilon", 1e-5))
        if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            raise has_no_key(place, "activation_function", config["activation_function"])
        return found
    if kind in DECLARED:
        _put_declared(put, found, config, architecture, place)
        return found
    width, heads = config["hidden_size"], config["num_attention_heads"]
    put("context_length", "I", config.get("max_position_embeddings"))
    put("embedding_length", "I", width)
    put("block_count", "I", config["num_hidden_layers"])
    put("feed_forward_length", "I", config["intermediate_size"])
    put("attention.head_count", "I", heads)
    head_dim = config.get("head_dim") or width // heads
    if kind == "gpt_neox":
        parameters = config.get("rope_parameters") or {}
        fraction = parameters.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        put("rope.dimension_count", "I", int(head_dim * fraction))
        put("rope.freq_base", "f", parameters.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
        put("attention.layer_norm_epsilon", "f", config.get("layer_norm_eps", 1e-5))
        found[f"{architecture}.use_parallel_residual"] = bool(config.get("use_parallel_residual", True))
        if config.get("hidden_act", "gelu") != "gelu":
            raise has_no_key(place, "hidden_act", config["hidden_act"])
        return found
    put("attention.head_count_kv", "I", config.get("num_key_value_heads") or heads)
    put("attention.layer_norm_rms_epsilon", "f", config.get("rms_norm_eps", 1e-6))
    put("vocab_size", "I", config["vocab_size"])
    put("attention.key_length", "I", head_dim)
    put("attention.value_length", "I", head_dim)
    rope = _rope(config)
    fraction = rope.get("partial_rotary_factor") or 1.0
    put("rope.dimension_count", "I", int(head_dim * fraction))
    put("rope.freq_base", "f", rope.get("rope_theta") or _THETA.get(kind, 10000.0))
    if kind == "phi3":
        original = config.get("original_max_position_embeddings") or 4096
        put("rope.scaling.original_context_length", "I", original)
    if kind == "mixtral":
        put("expert_count", "I", config.get("num_local_experts", 8))
        put("expert_used_count", "I", config.get("num_experts_per_tok", 2))
    if kind in ("gemma2", "gemma3_text", "phi3") or (kind == "mistral" and config.get("sliding_window")):
        default = None if kind == "phi3" else 4096
        put("attention.sliding_window", "I", config.get("sliding_window", default) or 0)
    if kind == "gemma2":
        put("attn_logit_softcapping", "f", config.get("attn_logit_softcapping", 50.0))
        put("final_logit_softcapping", "f", config.get("final_logit_softcapping", 30.0))
    if kind in ("gemma2", "gemma3_text"):
        _check_gemma_scale(config, kind, head_dim, place)
    _put_scaling(put, found, architecture, rope, place)
    return found


def _put_declared(
    put: Any, found: dict[str, Any], config: Mapping[str, Any], architecture: str, place: str
) -> None:
    """The keys of an architecture whose keys are a table."""
    declared = DECLARED[config["model_type"]]

    def size(name: str) -> Any:
        return config.get(declared.names.get(name, name), config.get(name))

    for name, values in declared.constants.items():
        if name in config and config[name] not in values:
            raise has_no_key(place, name, config[name])
    types, every = config.get("layer_types"), declared.global_every
    if every is not None and types is not None:
        kinds = ("sliding_attention", "full_attention")
        if list(types) != [kinds[(i + 1) % every == 0] for i in range(config["num_hidden_layers"])]:
            raise has_no_key(place, "layer_types", types)
    width = config["hidden_size" if "hidden_size" in config else "n_embed"]
    heads = size("num_attention_heads")
    put("context_length", "I", size("max_position_embeddings") or 2048)
    put("embedding_length", "I", width)
    put("block_count", "I", size("num_hidden_layers"))
    put("feed_forward_length", "I", config.get("intermediate_size") or 4 * width)
    put("attention.head_count", "I", heads)
    for key in declared.keys:
        value = config.get(key.field)
        value = key.default if value is None else value
        if key.field == "num_key_value_heads" and value is None:
            value = heads
        if key.form == "bool":
            found[f"{architecture}.{key.key}"] = bool(value)
        else:
            put(key.key, key.form, value)
    head_dim = (config.get("head_dim") if declared.wide_heads else None) or width // heads
    if declared.wide_heads:
        put("attention.key_length", "I", head_dim)
        put("attention.value_length", "I", head_dim)
    if not declared.rotated:
        return
    rope = _rope(config)
    fraction = rope.get("partial_rotary_factor") or declared.partial or 1.0
    put("rope.dimension_count", "I", int(head_dim * fraction))
    put("rope.freq_base", "f", rope.get("rope_theta") or 10000.0)
    _put_scaling(put, found, architecture, rope, place)


def _check_gemma_scale(config: Mapping[str, Any], kind: str, head_dim: int, place: str) -> None:
    large = config["num_hidden_layers"] == LAYERS_OF_27B[kind]
    expected = config["hidden_size"] // config["num_attention_heads"] if large else head_dim
    if config.get("query_pre_attn_scalar", 256) != expected:
        raise has_no_key(place, "query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of either age of configs, those of global layers where there are two kinds."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given.get("full_attention", given)
    names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    outer = {name: config[name] for name in names if config.get(name) is not None}
    return outer | {name: value for name, value in given.items() if value is not None}


def _put_scaling(
    put: Any, found: dict[str, Any], architecture: str, rope: Mapping[str, Any], place: str
) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "llama3", "longrope", "su"):
        if kind in ("longrope", "su"):
            put("rope.scaling.original_context_length", "I", rope.get("original_max_position_embeddings"))
            put("rope.scaling.attn_factor", "f", rope.get("attention_factor"))
        return
    if kind not in ("linear", "yarn"):
        raise has_no_key(place, "rope_type", kind)
    found[f"{architecture}.rope.scaling.type"] = kind
    put("rope.scaling.factor", "f", rope["factor"])
    if kind == "yarn":
        put("rope.scaling.original_context_length", "I", rope.get("original_max_position_embeddings"))
        put("rope.scaling.yarn_beta_fast", "f", rope.get("beta_fast"))
        put("rope.scaling.yarn_beta_slow", "f", rope.get("beta_slow"))
        put("rope.scaling.attn_factor", "f", rope.get("attention_factor"))


def folded_from(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """The rotary factors that the format keeps as tensors, by their name in the file."""
    if config["model_type"] in ("gpt2", "gpt_neox", "bloom"):
        return {}
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "llama3":
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        factors = llama3_factors(rope, float(rope.get("rope_theta") or 10000.0), dim)
        return {"rope_freqs.weight": factors.astype(np.float32).tolist()}
    if kind in ("longrope", "su"):
        return {f"rope_factors_{name}.weight": list(rope[f"{name}_factor"]) for name in ("long", "short")}
    return {}
