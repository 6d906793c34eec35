"""The `config.json` of a Hugging Face model from the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converters. What llama.cpp
computes without a key for it is written out: the attention scale of the 27B Gemmas, the local rotation of
Gemma 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergelab.checkpoints.gguf.declared import DECLARED
from mergelab.errors import CheckpointError, quoted

__all__ = ["LAYERS_OF_27B", "config_from", "llama3_factors"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    **{model_type: declared.model_class for model_type, declared in DECLARED.items()},
}
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Metadata:
    """Values of one architecture's keys, checked for their type where they are read."""

    def __init__(self, metadata: Mapping[str, Any], place: str):
        self.all, self.place = metadata, place
        self.architecture = str(metadata.get("general.architecture"))

    def _value(self, key: str, default: Any) -> Any:
        value = self.all.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]  # one for each layer, all alike
        if value is None:
            raise CheckpointError(
                f"{self.place} lacks {self.architecture}.{key}, which a model of its architecture needs; "
                "convert the model again with a recent llama.cpp"
            )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        return _shortest(value)

    def switch(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.all

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place} has {self.architecture}.{key} = {quoted(value)}, but expected {expected}; convert "
            "the model again with a recent llama.cpp"
        )


def _shortest(value: float) -> float:
    """The shortest number that is the same as float32: files hold 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 3e38 else value


def config_from(
    metadata: Mapping[str, Any],
    model_type: str,
    shapes: Mapping[str, Sequence[int]],
    folded: Mapping[str, Sequence[float]],
    dtype: str,
    place: str,
) -> dict[str, Any]:
    """The fields of `config.json`.

    Args:
        metadata: that of the file.
        model_type: the model type.
        shapes: shapes of the tensors by their stored name.
        folded: values of the tensors that are numbers of the configuration.
        dtype: name of the dtype that the weights are read as.
        place: the file's path, for messages.

    Raises:
        CheckpointError: a key is missing, or its value of another type.
    """
    data = _Metadata(metadata, place)
    width, layers, heads = (data.size(k) for k in ("embedding_length", "block_count", "attention.head_count"))
    vocabulary = int(shapes["token_embd.weight"][0]) if "token_embd.weight" in shapes else 0
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": vocabulary or len(metadata.get("tokenizer.ggml.tokens") or ()),
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            common[f"{role}_token_id"] = token
    if model_type == "gpt2":
        return common | {
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": data.size("context_length"),
            "n_inner": data.size("feed_forward_length", 4 * width),
            "layer_norm_epsilon": data.number("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    if model_type in DECLARED:
        return common | _declared(data, model_type, width, heads, layers, shapes, folded)
    common |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": data.size("feed_forward_length"),
        "max_position_embeddings": data.size("context_length"),
    }
    if model_type == "gpt_neox":
        head_dim = width // max(heads, 1)
        rotated = data.size("rope.dimension_count", head_dim)
        return common | {
            "layer_norm_eps": data.number("attention.layer_norm_epsilon"),
            "use_parallel_residual": bool(data._value("use_parallel_residual", True)),
            "rotary_pct": rotated / max(head_dim, 1),
            "rotary_emb_base": data.number("rope.freq_base", 10000.0),
            "hidden_act": "gelu",
        }
    return common | _llama_like(data, model_type, width, heads, layers, shapes, folded)


def _declared(
    data: _Metadata,
    model_type: str,
    width: int,
    heads: int,
    layers: int,
    shapes: Mapping[str, Sequence[int]],
    folded: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The fields of an architecture whose keys are a table."""
    declared, head_dim = DECLARED[model_type], width // max(heads, 1)
    for key, other in declared.absent.items():
        if data.has(key):
            raise CheckpointError(
                f"{data.place} has {data.architecture}.{key}, as files of {other} have, which are not read; "
                "use the Hugging Face folder of the model"
            )
    found: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": data.size("context_length"),
        **{name: values[0] for name, values in declared.constants.items()},
        **{name: tensor in shapes for name, tensor in declared.seen.items()},
    }
    if "num_hidden_layers" not in declared.names:
        found["intermediate_size"] = data.size("feed_forward_length")
    for key in declared.keys:
        if key.required or data.has(key.key):
            read = {"I": data.size, "f": data.number, "bool": data.switch}[key.form]
            found[key.field] = read(key.key)
    if declared.wide_heads:
        head_dim = found["head_dim"] = data.size("attention.key_length", head_dim)
    found = {declared.names.get(name, name): value for name, value in found.items()}
    if not declared.rotated:
        return found
    found["rope_theta"] = data.number("rope.freq_base", 10000.0)
    if declared.partial is not None:
        found["partial_rotary_factor"] = data.size("rope.dimension_count", head_dim) / max(head_dim, 1)
    scaling = _scaling(data, folded)
    return found | ({"rope_scaling": scaling} if scaling else {})


def _llama_like(
    data: _Metadata,
    model_type: str,
    width: int,
    heads: int,
    layers: int,
    shapes: Mapping[str, Sequence[int]],
    folded: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    usual = width // max(heads, 1)
    rotated = data.size("rope.dimension_count", usual)
    head_dim = data.size("attention.key_length", rotated if model_type in ("llama", "mixtral") else usual)
    found: dict[str, Any] = {
        "num_key_value_heads": data.size("attention.head_count_kv", heads),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": data.number("rope.freq_base", 10000.0),
        "hidden_act": "silu",
    }
    if head_dim != usual or model_type in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        found["head_dim"] = head_dim
    if model_type in ("llama", "qwen3"):
        found["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if model_type == "llama":
        found["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if model_type == "mixtral":
        found["num_local_experts"] = data.size("expert_count")
        found["num_experts_per_tok"] = data.size("expert_used_count")
    if model_type.startswith("gemma"):
        found |= _gemma(data, model_type, width, heads, layers, head_dim)
        del found["hidden_act"]
    if model_type == "phi3":
        found["sliding_window"] = data.size("attention.sliding_window", 0) or None
        original = data.size("rope.scaling.original_context_length", data.size("context_length"))
        found["original_max_position_embeddings"] = original
        if rotated != head_dim:
            found["partial_rotary_factor"] = rotated / max(head_dim, 1)
    scaling = _scaling(data, folded)
    return found | ({"rope_scaling": scaling} if scaling else {})


def _gemma(
    data: _Metadata, model_type: str, width: int, heads: int, layers: int, head_dim: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
    if model_type == "gemma":
        return found
    large = layers == LAYERS_OF_27B[model_type]
    found["query_pre_attn_scalar"] = width // heads if large else head_dim
    found["sliding_window"] = data.size("attention.sliding_window", 4096)
    if model_type == "gemma2":
        found["attn_logit_softcapping"] = data.number("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = data.number("final_logit_softcapping", 30.0)
        return found
    found["rope_theta"] = data.number("rope.freq_base", 1e6)
    found["rope_local_base_freq"] = data.number("rope.freq_base_swa", 10000.0)
    found["sliding_window_pattern"] = data.size("attention.sliding_window_pattern", 6)
    if data.has("final_logit_softcapping"):
        found["final_logit_softcapping"] = data.number("final_logit_softcapping")
    return found


def _scaling(data: _Metadata, folded: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """`rope_scaling`, from keys and from the factors that are stored as tensors."""
    long, short = (
        [_shortest(float(x)) for x in folded.get(f"rope_factors_{kind}.weight", ())]
        for kind in ("long", "short")
    )
    if long and short:
        attention = {}
        if data.has("rope.scaling.attn_factor"):
            attention["attention_factor"] = data.number("rope.scaling.attn_factor")
        original = data.size("rope.scaling.original_context_length", data.size("context_length"))
        named = {"original_max_position_embeddings": original} | attention
        return {
            "type": "longrope",
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            **named,
        }
    factors = [float(x) for x in folded.get("rope_freqs.weight", ())]
    if factors:
        return _llama3(data, factors)
    kind = data.all.get(f"{data.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{data.place} has {data.architecture}.rope.scaling.type = {quoted(kind)}, but only 'none', "
            "'linear' and 'yarn' are read; convert the model from its Hugging Face folder instead"
        )
    found = {"rope_type": kind, "factor": data.number("rope.scaling.factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = data.size("rope.scaling.original_context_length")
        for field, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if data.has(f"rope.scaling.{key}"):
                found[field] = data.number(f"rope.scaling.{key}")
        if data.has("rope.scaling.attn_factor"):
            found["attention_factor"] = data.number("rope.scaling.attn_factor")
    return found


def _llama3(data: _Metadata, factors: Sequence[float]) -> dict[str, Any]:
    """Llama 3's scaling where the factors are its, else the same factors for every length."""
    theta = data.number("rope.freq_base", 10000.0)
    for original in (8192, data.size("rope.scaling.original_context_length", 8192)):
        guess = {"rope_type": "llama3", "factor": _shortest(max(factors)), **_LLAMA3}
        guess["original_max_position_embeddings"] = original
        if np.allclose(llama3_factors(guess, theta, 2 * len(factors)), factors, rtol=1e-5):
            return guess
    return {
        "rope_type": "longrope",
        "short_factor": list(factors),
        "long_factor": list(factors),
        "original_max_position_embeddings": data.size("context_length"),
        "attention_factor": 1.0,
    }


def llama3_factors(scaling: Mapping[str, Any], theta: float, dim: int) -> np.ndarray:
    """What each rotary frequency is divided by: `transformers`' rule for Llama 3, float64 `[dim / 2]`."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high, factor = (float(scaling[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
