"""What an extracted adapter must say of a tied head, which PEFT parts from an embedding stored whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mergelab.checkpoints import Checkpoint, TensorSource
from mergelab.checkpoints.tied_head import TiedHead, find_tied_head, is_tied, shared_embedding
from mergelab.errors import CheckpointError

__all__ = [
    "ChangedHead",
    "changed_head",
    "class_names",
    "head_tensors",
    "paired_pieces",
    "repeated_embeddings",
    "unsplittable",
]

_INNER = {
    "albert": "albert.", "bert": "bert.", "deberta-v2": "deberta.", "distilbert": "distilbert.",
    "electra": "electra.", "gpt_neox": "gpt_neox.", "mpnet": "mpnet.", "vit": "vit.",
    **dict.fromkeys(("camembert", "roberta", "xlm-roberta"), "roberta."),
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gpt_neo", "gptj"), "transformer."),
    **dict.fromkeys(("mamba", "mamba2"), "backbone."),
    **dict.fromkeys(
        (
            "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text",
            "gemma4_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "jamba", "llama", "llama4_text",
            "mistral", "mixtral", "modernbert", "neobert", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3",
            "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
            "smollm3", "stablelm", "starcoder2",
        ),
        "model.",
    ),
}  # fmt: skip
"""By model type: where a class with a head keeps the model without one."""
_HEADS = (
    "lm_head",
    "cls",
    "score",
    "classifier",
    "embed_out",
    "vocab_projector",
    "predictions",
    "qa_outputs",
)
_PIECE = 1 << 21


@dataclass(frozen=True)
class ChangedHead:
    """The head of a model whose base ties it to the embedding, in both models.

    Attributes:
        tied: the base's embedding and head.
        is_tied: whether the fine-tuned head still has the values of the fine-tuned embedding.
        differs: whether it has other values than the base's.
        weight: the fine-tuned head.
        base_weight: the base's embedding.
        bias: the fine-tuned bias of the head's module, if it has one.
        bias_differs: whether that changed.
    """

    tied: TiedHead
    is_tied: bool
    differs: bool
    weight: TensorSource
    base_weight: TensorSource
    bias: TensorSource | None
    bias_differs: bool

    @property
    def module(self) -> str:
        """The head's module."""
        return self.tied.modules[1]

    def tensors(self, *, whole: bool, factors: bool, skipped: bool) -> dict[str, TensorSource]:
        """What the adapter must store of the head, by part; empty if PEFT's merge gives it anyhow.

        Args:
            whole: the embedding is stored whole: PEFT leaves the head what it was.
            factors: the embedding gets factors: PEFT adds them to the matrix both share.
            skipped: the embedding changed, and is not in the adapter.
        """
        weight = self.weight
        if self.is_tied:
            needed = whole or self.bias_differs
            weight = self.base_weight if skipped else weight
        else:
            needed = self.differs or factors or self.bias_differs
        if not needed:
            return {}
        return {"weight": weight} | ({} if self.bias is None else {"bias": self.bias})


def changed_head(tuned: Checkpoint, base: Checkpoint) -> ChangedHead | None:
    """Compares the heads of two models; None where the base's is not tied.

    Raises:
        CheckpointError: the fine-tuned head or its bias has another shape.
    """
    tied = find_tied_head(base.tensors, base.config)
    if tied is None or tied.embedding not in tuned.tensors:
        return None
    old, embedding = base.tensors[tied.embedding], tuned.tensors[tied.embedding]
    own = tied.head in tuned.tensors and not is_tied(tuned.config)
    weight = tuned.tensors[tied.head] if own else embedding
    if weight.shape != old.shape:
        raise CheckpointError(
            f"{tuned.path}: tensor {weight.name!r} has shape {list(weight.shape)} but {list(old.shape)} in "
            f"{base.path}; an adapter cannot change a shape: cut or extend the vocabulary first"
        )
    name = _bias(tied, base)
    bias = None if name is None else tuned.tensors.get(name)
    if own and tied.bias is not None:
        bias = tuned.tensors.get(tied.bias[0], bias)
    if name is not None and (bias is None or bias.shape != base.tensors[name].shape):
        raise CheckpointError(f"{tuned.path} lacks the tensor {name!r} of {base.path}; name its fine-tune")
    return ChangedHead(
        tied,
        is_tied=not own or _equal(weight, embedding),
        differs=not _equal(weight, old),
        weight=weight,
        base_weight=old,
        bias=bias,
        bias_differs=name is not None and bias is not None and not _equal(bias, base.tensors[name]),
    )


def head_tensors(base: Checkpoint) -> set[str]:
    """Names under which a base with a tied head, or its fine-tune, may store that head."""
    tied = find_tied_head(base.tensors, base.config)
    if tied is None:
        return set()
    bias = _bias(tied, base)
    return {tied.head, *(tied.bias or ()), *(() if bias is None else (bias,))}


def repeated_embeddings(base: Checkpoint) -> set[str]:
    """Copies that models of an encoder and a decoder may store of the embedding both share."""
    if shared_embedding(base.tensors) is None:
        return set()
    ends = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    copies = {f"{prefix}{end}" for prefix in ("", "model.") for end in ends}
    return copies | ({"lm_head.weight"} if is_tied(base.config, base.tensors) else set())


def unsplittable(base: Checkpoint) -> str | None:
    """The embedding that a module stored whole cannot replace: encoder and decoder share it, or PEFT's
    transformers calls its tied head by another name than checkpoints do.
    """
    if (shared := shared_embedding(base.tensors)) is not None:
        return shared
    tied = find_tied_head(base.tensors, base.config)
    return tied.embedding if tied is not None and tied.embedding.endswith("embed_in.weight") else None


def class_names(modules: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Modules by their names in the class that the config names, in which PEFT looks for them.

    A file saved from a class without a head (GPT-2 on the hub) spells them without a leading part.
    """
    modules = tuple(modules)
    inner = _INNER.get(str(base.config.get("model_type")), "")
    named = base.config.get("architectures")
    whole = isinstance(named, list) and any("For" in str(name) or "Head" in str(name) for name in named)
    if not inner or not whole or any(name.startswith(inner) for name in modules):
        inner = ""
    return {name: name if name.split(".")[0] in _HEADS else f"{inner}{name}" for name in modules}


def _bias(tied: TiedHead, base: Checkpoint) -> str | None:
    if tied.bias is not None:
        return tied.bias[1]
    own = f"{tied.modules[1]}.bias"
    return own if own in base.tensors else None


def _equal(one: TensorSource, other: TensorSource) -> bool:
    return all(
        np.array_equal(left.astype(np.float32), right.astype(np.float32))
        for left, right in paired_pieces(one, other)
    )


def paired_pieces(one: TensorSource, other: TensorSource) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The flat elements of two tensors of one shape, some megabytes at a time."""
    size = math.prod(one.shape)
    for start in range(0, size, _PIECE):
        pieces = tuple(np.empty(min(_PIECE, size - start), source.dtype) for source in (one, other))
        for source, piece in zip((one, other), pieces, strict=True):
            source.read_into(start, piece)
        yield pieces[0], pieces[1]
