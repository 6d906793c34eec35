"""llama.cpp's names of tensors, and how each lies beside the tensor of a Hugging Face model.

Facts from llama.cpp's converters (https://github.com/ggml-org/llama.cpp, folder `conversion`) and from the
names in the `gguf` package; `transformers` reads the same files to the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = [
    "ARCHITECTURES",
    "FOLDED",
    "GgufArchitecture",
    "Tensor",
    "by_name",
    "by_stored",
    "fused_heads_order",
    "pattern_of",
    "rotary_order",
]

Change = Literal["", "rotary", "rotary_kv", "fused_heads", "minus_one", "transposed", "experts"]
"""What makes a stored tensor the Hugging Face one: nothing; rows of a head ordered in halves, not in pairs;
query, key and value ordered by head; 1 subtracted (norms of Gemma); a transposition; one slice for each
expert."""


@dataclass(frozen=True)
class Tensor:
    """One kind of tensor: `{i}` stands for the layer, `{e}` for the expert; a bias goes as its weight does.

    Attributes:
        stored: llama.cpp's name without `.weight` or `.bias`.
        name: the Hugging Face name, likewise.
        change: how the two differ.
    """

    stored: str
    name: str
    change: Change = ""


@dataclass(frozen=True)
class GgufArchitecture:
    """One `general.architecture`.

    Attributes:
        model_type: that of `config.json`.
        tensors: all kinds of tensors it may have.
    """

    model_type: str
    tensors: tuple[Tensor, ...]


_OUTSIDE = (
    Tensor("token_embd", "model.embed_tokens"),
    Tensor("output_norm", "model.norm"),
    Tensor("output", "lm_head"),
)
_LAYER = "model.layers.{i}"
_ATTENTION = (
    Tensor("blk.{i}.attn_q", f"{_LAYER}.self_attn.q_proj"),
    Tensor("blk.{i}.attn_k", f"{_LAYER}.self_attn.k_proj"),
    Tensor("blk.{i}.attn_v", f"{_LAYER}.self_attn.v_proj"),
    Tensor("blk.{i}.attn_output", f"{_LAYER}.self_attn.o_proj"),
)
_ROTARY_ATTENTION = (
    Tensor("blk.{i}.attn_q", f"{_LAYER}.self_attn.q_proj", "rotary"),
    Tensor("blk.{i}.attn_k", f"{_LAYER}.self_attn.k_proj", "rotary_kv"),
    *_ATTENTION[2:],
)
_HEAD_NORMS = (
    Tensor("blk.{i}.attn_q_norm", f"{_LAYER}.self_attn.q_norm"),
    Tensor("blk.{i}.attn_k_norm", f"{_LAYER}.self_attn.k_norm"),
)
_MLP = (
    Tensor("blk.{i}.ffn_gate", f"{_LAYER}.mlp.gate_proj"),
    Tensor("blk.{i}.ffn_up", f"{_LAYER}.mlp.up_proj"),
    Tensor("blk.{i}.ffn_down", f"{_LAYER}.mlp.down_proj"),
)
_NORMS = (
    Tensor("blk.{i}.attn_norm", f"{_LAYER}.input_layernorm"),
    Tensor("blk.{i}.ffn_norm", f"{_LAYER}.post_attention_layernorm"),
)
_MOE = "block_sparse_moe"
_EXPERTS = (
    Tensor("blk.{i}.ffn_gate_inp", f"{_LAYER}.{_MOE}.gate"),
    Tensor("blk.{i}.ffn_gate_exps", f"{_LAYER}.{_MOE}.experts.{{e}}.w1", "experts"),
    Tensor("blk.{i}.ffn_down_exps", f"{_LAYER}.{_MOE}.experts.{{e}}.w2", "experts"),
    Tensor("blk.{i}.ffn_up_exps", f"{_LAYER}.{_MOE}.experts.{{e}}.w3", "experts"),
)
_OLD_EXPERTS = tuple(  # of files before the experts of a layer were one tensor
    Tensor(f"blk.{{i}}.ffn_{ours}.{{e}}", f"{_LAYER}.{_MOE}.experts.{{e}}.{theirs}")
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
)
_GEMMA_OUTSIDE = (_OUTSIDE[0], Tensor("output_norm", "model.norm", "minus_one"), _OUTSIDE[2])
_GEMMA_NORMS = (
    Tensor("blk.{i}.attn_norm", f"{_LAYER}.input_layernorm", "minus_one"),
    Tensor("blk.{i}.post_attention_norm", f"{_LAYER}.post_attention_layernorm", "minus_one"),
    Tensor("blk.{i}.ffn_norm", f"{_LAYER}.pre_feedforward_layernorm", "minus_one"),
    Tensor("blk.{i}.post_ffw_norm", f"{_LAYER}.post_feedforward_layernorm", "minus_one"),
    Tensor("blk.{i}.attn_q_norm", f"{_LAYER}.self_attn.q_norm", "minus_one"),
    Tensor("blk.{i}.attn_k_norm", f"{_LAYER}.self_attn.k_norm", "minus_one"),
)
_GEMMA1_NORMS = (
    _GEMMA_NORMS[0],
    Tensor("blk.{i}.ffn_norm", f"{_LAYER}.post_attention_layernorm", "minus_one"),
)
_GPT2, _NEOX = "transformer.h.{i}", "gpt_neox.layers.{i}"
_POST_NORMS = (
    Tensor("blk.{i}.post_attention_norm", f"{_LAYER}.post_attention_layernorm"),
    Tensor("blk.{i}.post_ffw_norm", f"{_LAYER}.post_feedforward_layernorm"),
)
_NAMED_EXPERTS = (
    Tensor("blk.{i}.ffn_gate_inp", f"{_LAYER}.mlp.gate"),
    *(
        Tensor(f"blk.{{i}}.ffn_{name}_exps", f"{_LAYER}.mlp.experts.{{e}}.{name}_proj", "experts")
        for name in ("gate", "down", "up")
    ),
)

LLAMA = GgufArchitecture("llama", (*_OUTSIDE, *_NORMS, *_ROTARY_ATTENTION, *_MLP))
QWEN3 = (*_OUTSIDE, *_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP)
GEMMA = (*_GEMMA_OUTSIDE, *_GEMMA_NORMS, *_ATTENTION, *_MLP)

ARCHITECTURES: dict[str, tuple[GgufArchitecture, ...]] = {
    # Mistral goes as Llama in these files, and Mixtral as a Llama that has experts.
    "llama": (
        LLAMA,
        GgufArchitecture("mistral", LLAMA.tensors),
        GgufArchitecture("mixtral", (*_OUTSIDE, *_NORMS, *_ROTARY_ATTENTION, *_OLD_EXPERTS, *_EXPERTS)),
    ),
    "qwen2": (GgufArchitecture("qwen2", (*_OUTSIDE, *_NORMS, *_ATTENTION, *_MLP)),),
    "qwen3": (GgufArchitecture("qwen3", QWEN3),),
    "gemma": (GgufArchitecture("gemma", (*_GEMMA_OUTSIDE, *_GEMMA1_NORMS, *_ATTENTION, *_MLP)),),
    "gemma2": (GgufArchitecture("gemma2", GEMMA),),
    "gemma3": (GgufArchitecture("gemma3_text", GEMMA),),
    "phi3": (
        GgufArchitecture(
            "phi3",
            (
                *_OUTSIDE,
                *_NORMS,
                Tensor("blk.{i}.attn_qkv", f"{_LAYER}.self_attn.qkv_proj"),
                _ATTENTION[3],
                Tensor("blk.{i}.ffn_up", f"{_LAYER}.mlp.gate_up_proj"),
                _MLP[2],
            ),
        ),
    ),
    "olmo2": (GgufArchitecture("olmo2", (*_OUTSIDE, *_ATTENTION, *_HEAD_NORMS, *_POST_NORMS, *_MLP)),),
    "granite": (GgufArchitecture("granite", (*_OUTSIDE, *_NORMS, *_ROTARY_ATTENTION, *_MLP)),),
    "starcoder2": (
        GgufArchitecture(
            "starcoder2",
            (
                *_OUTSIDE,
                *_NORMS,
                *_ATTENTION,
                Tensor("blk.{i}.ffn_up", f"{_LAYER}.mlp.c_fc"),
                Tensor("blk.{i}.ffn_down", f"{_LAYER}.mlp.c_proj"),
            ),
        ),
    ),
    "phi2": (
        GgufArchitecture(
            "phi",
            (
                _OUTSIDE[0],
                Tensor("output_norm", "model.final_layernorm"),
                _OUTSIDE[2],
                _NORMS[0],
                *_ATTENTION[:3],
                Tensor("blk.{i}.attn_output", f"{_LAYER}.self_attn.dense"),
                Tensor("blk.{i}.ffn_up", f"{_LAYER}.mlp.fc1"),
                Tensor("blk.{i}.ffn_down", f"{_LAYER}.mlp.fc2"),
            ),
        ),
    ),
    "stablelm": (GgufArchitecture("stablelm", (*_OUTSIDE, *_NORMS, *_ATTENTION, *_MLP)),),
    "command-r": (GgufArchitecture("cohere", (*_OUTSIDE, _NORMS[0], *_ATTENTION, *_HEAD_NORMS, *_MLP)),),
    "glm4": (
        GgufArchitecture(
            "glm4",
            (
                *_OUTSIDE,
                *_NORMS,
                *_ATTENTION,
                Tensor("blk.{i}.post_attention_norm", f"{_LAYER}.post_self_attn_layernorm"),
                Tensor("blk.{i}.post_ffw_norm", f"{_LAYER}.post_mlp_layernorm"),
                Tensor("blk.{i}.ffn_up", f"{_LAYER}.mlp.gate_up_proj"),
                _MLP[2],
            ),
        ),
    ),
    "qwen3moe": (
        GgufArchitecture("qwen3_moe", (*_OUTSIDE, *_NORMS, *_ATTENTION, *_HEAD_NORMS, *_NAMED_EXPERTS)),
    ),
    "bloom": (
        GgufArchitecture(
            "bloom",
            (
                Tensor("token_embd", "transformer.word_embeddings"),
                Tensor("token_embd_norm", "transformer.word_embeddings_layernorm"),
                Tensor("output_norm", "transformer.ln_f"),
                Tensor("output", "lm_head"),
                Tensor("blk.{i}.attn_norm", f"{_GPT2}.input_layernorm"),
                Tensor("blk.{i}.attn_qkv", f"{_GPT2}.self_attention.query_key_value", "fused_heads"),
                Tensor("blk.{i}.attn_output", f"{_GPT2}.self_attention.dense"),
                Tensor("blk.{i}.ffn_norm", f"{_GPT2}.post_attention_layernorm"),
                Tensor("blk.{i}.ffn_up", f"{_GPT2}.mlp.dense_h_to_4h"),
                Tensor("blk.{i}.ffn_down", f"{_GPT2}.mlp.dense_4h_to_h"),
            ),
        ),
    ),
    "gpt2": (
        GgufArchitecture(
            "gpt2",
            (
                Tensor("token_embd", "transformer.wte"),
                Tensor("position_embd", "transformer.wpe"),
                Tensor("output_norm", "transformer.ln_f"),
                Tensor("output", "lm_head"),
                Tensor("blk.{i}.attn_norm", f"{_GPT2}.ln_1"),
                Tensor("blk.{i}.attn_qkv", f"{_GPT2}.attn.c_attn", "transposed"),
                Tensor("blk.{i}.attn_output", f"{_GPT2}.attn.c_proj", "transposed"),
                Tensor("blk.{i}.ffn_norm", f"{_GPT2}.ln_2"),
                Tensor("blk.{i}.ffn_up", f"{_GPT2}.mlp.c_fc", "transposed"),
                Tensor("blk.{i}.ffn_down", f"{_GPT2}.mlp.c_proj", "transposed"),
            ),
        ),
    ),
    "gptneox": (
        GgufArchitecture(
            "gpt_neox",
            (
                Tensor("token_embd", "gpt_neox.embed_in"),
                Tensor("output_norm", "gpt_neox.final_layer_norm"),
                Tensor("output", "embed_out"),
                Tensor("blk.{i}.attn_norm", f"{_NEOX}.input_layernorm"),
                Tensor("blk.{i}.attn_qkv", f"{_NEOX}.attention.query_key_value", "fused_heads"),
                Tensor("blk.{i}.attn_output", f"{_NEOX}.attention.dense"),
                Tensor("blk.{i}.ffn_norm", f"{_NEOX}.post_attention_layernorm"),
                Tensor("blk.{i}.ffn_up", f"{_NEOX}.mlp.dense_h_to_4h"),
                Tensor("blk.{i}.ffn_down", f"{_NEOX}.mlp.dense_4h_to_h"),
            ),
        ),
    ),
}
"""By the name in the file: the model types that it stands for, the usual one first."""

FOLDED = frozenset(["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"])
"""Tensors that are numbers of the configuration."""


def pattern_of(name: str) -> tuple[str, tuple[int, ...], str]:
    """A name's pattern (`blk.{i}.attn_q`), the numbers in it, and its ending (`.weight`, `.bias`)."""
    stem, dot, ending = name.rpartition(".")
    if ending not in ("weight", "bias"):
        stem, dot, ending = name, "", ""
    parts, numbers = stem.split("."), []
    for place, part in enumerate(parts):
        if re.fullmatch("[0-9]{1,9}", part) and len(numbers) < 2:
            parts[place] = ("{i}", "{e}")[len(numbers)]
            numbers.append(int(part))
    return ".".join(parts), tuple(numbers), dot + ending


def rotary_order(heads: int, rows: int) -> np.ndarray:
    """The stored row of each row of a query or key projection.

    llama.cpp rotates neighboring components of a head, Hugging Face models a component of each half: its row
    `half * dim / 2 + j` of a head is the stored row `2 j + half`.
    """
    dim = rows // heads
    within = np.arange(dim).reshape(dim // 2, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * dim + within).reshape(-1)


def fused_heads_order(heads: int, rows: int) -> np.ndarray:
    """The stored row, of `[3, heads, dim]`, of each row of a projection whose rows are `[heads, 3, dim]`."""
    return np.arange(rows).reshape(3, heads, rows // (3 * heads)).swapaxes(0, 1).reshape(-1)


def by_stored(tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The kinds of tensors by the stored pattern."""
    return {tensor.stored: tensor for tensor in tensors}


def by_name(tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The kinds of tensors by the pattern of the Hugging Face name."""
    return {tensor.name: tensor for tensor in tensors}
