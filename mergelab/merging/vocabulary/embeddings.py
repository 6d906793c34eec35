"""Which tensors have one row per token, by the names Hugging Face models give them."""

from __future__ import annotations

from collections.abc import Iterable

from mergelab.checkpoints.source import Checkpoint, TensorSource

__all__ = ["input_embedding", "is_output_embedding", "is_token_tensor"]

_INPUT = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
_OUTPUT = (
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "output.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
)
_WHOLE = ("output.weight",)  # inside a layer, this name is that of a projection


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == end or (name.endswith("." + end) and end not in _WHOLE) for end in endings)


def is_output_embedding(name: str) -> bool:
    """Whether the tensor called `name` gives one logit per token (lm_head and its bias)."""
    return _ends_with(name, _OUTPUT)


def is_token_tensor(name: str) -> bool:
    """Whether the first axis of the tensor called `name` counts tokens."""
    return _ends_with(name, _INPUT) or is_output_embedding(name)


def input_embedding(checkpoint: Checkpoint) -> TensorSource | None:
    """The model's input embedding `[rows, width]`, or None if it has none under a known name."""
    return next((t for name, t in checkpoint.tensors.items() if _ends_with(name, _INPUT)), None)
