"""Which tensors of a checkpoint are one: the input embedding and the head that reads it backwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "TiedHead",
    "conv1d_layers",
    "find_tied_head",
    "is_tied",
    "is_token_matrix",
    "shared_embedding",
    "untied_config",
]

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = {
    "gpt_neox": ("embed_out", None),
    "bert": ("cls.predictions.decoder", "cls.predictions.bias"),
    "roberta": ("lm_head.decoder", "lm_head.bias"),
    "xlm-roberta": ("lm_head.decoder", "lm_head.bias"),
    "camembert": ("lm_head.decoder", "lm_head.bias"),
    "mpnet": ("lm_head.decoder", "lm_head.bias"),
    "distilbert": ("vocab_projector", None),
    "albert": ("predictions.decoder", "predictions.bias"),
    "electra": ("generator_lm_head", None),
}
"""By model type: the head's module, and its bias where that is stored under another name."""
_TIED_UNLESS_SAID = frozenset((
    "albert", "bert", "bloom", "camembert", "cohere", "cohere2", "distilbert", "electra", "falcon",
    "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo",
    "mpnet", "openai-gpt", "opt", "roberta", "smollm3", "starcoder2", "xlm-roberta",
))  # fmt: skip
"""Model types whose configs, as transformers reads them, tie the head where they do not mention it."""
_UNTIED_UNLESS_SAID = frozenset((
    "deepseek_v2", "deepseek_v3", "glm", "glm4", "glm4_moe", "gpt_neox", "gpt_oss", "gptj", "granite",
    "llama", "llama4", "llama4_text", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm",
))  # fmt: skip
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
_CONV1D_TYPES = frozenset(["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])


@dataclass(frozen=True)
class TiedHead:
    """A head whose matrix is the input embedding.

    Attributes:
        embedding: the embedding's tensor, which the checkpoint stores.
        head: the head's tensor, which it may store too, as a copy.
        bias: the bias of the head's module, and the tensor that stores it under another name; or None.
    """

    embedding: str
    head: str
    bias: tuple[str, str] | None = None

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of both."""
        return self.embedding.removesuffix(".weight"), self.head.removesuffix(".weight")


def is_tied(config: Mapping[str, Any], tensors: Collection[str] = ()) -> bool:
    """Whether a `config.json` makes the head the input embedding, as transformers reads it.

    Args:
        config: the model's; empty if it has none.
        tensors: names of its tensors: where neither config nor type says it, a model without a head is tied.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    kind = config.get("model_type")
    if kind in _TIED_UNLESS_SAID or kind in _UNTIED_UNLESS_SAID:
        return kind in _TIED_UNLESS_SAID
    return bool(config and tensors and not any(_is_head(name, config) for name in tensors))


def find_tied_head(tensors: Collection[str], config: Mapping[str, Any]) -> TiedHead | None:
    """The tied head of a model, or None where it has no head, one of its own, or names that are not known."""
    found = [name for name in tensors if name in _EMBEDDINGS or name.endswith(_DOTTED)]
    if len(found) != 1 or not is_tied(config, tensors):
        return None
    module, bias = _HEADS.get(str(config.get("model_type")), ("lm_head", None))
    embedding = found[0]
    # A wrapped language model keeps its head inside the wrapper.
    inner = embedding.rpartition(".model.embed_tokens.weight")[0]
    wrapper = f"{inner}." if inner and inner != "model" else ""
    head = f"{wrapper}{module}.weight"
    if not (head in tensors or (bias is not None and bias in tensors) or _may_have_head(config)):
        return None
    stored = bias is not None and bias in tensors
    return TiedHead(embedding, head, (f"{module}.bias", str(bias)) if stored else None)


def is_token_matrix(name: str) -> bool:
    """Whether a tensor of this name has a row for each token: an input embedding or a head."""
    heads = ("lm_head", *(module for module, _ in _HEADS.values()))
    ends = (*_EMBEDDINGS, "shared.weight", *(f"{module}.weight" for module in heads))
    return any(name == end or name.endswith(f".{end}") for end in ends)


def shared_embedding(tensors: Collection[str]) -> str | None:
    """The embedding that encoder and decoder share (T5, BART), which no module saved whole can replace."""
    return next((name for name in tensors if name in ("shared.weight", "model.shared.weight")), None)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `tie_word_embeddings` false wherever it is set, and at the top."""
    changed = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def conv1d_layers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Last names of the modules of this model that store their weights `[in, out]`."""
    return _CONV1D if config.get("model_type") in _CONV1D_TYPES else ()


_DOTTED = tuple(f".{name}" for name in _EMBEDDINGS)


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    module, _ = _HEADS.get(str(config.get("model_type")), ("lm_head", None))
    return name == f"{module}.weight" or name.endswith(f".{module}.weight")


def _may_have_head(config: Mapping[str, Any]) -> bool:
    """Whether the class that the config names has a head; one that names none is taken to be whole."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return True
    return any(str(name).endswith(_WITH_HEAD) for name in named)
