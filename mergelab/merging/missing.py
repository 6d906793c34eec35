"""What becomes of an output tensor that some input models lack, as mergekit decides it per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergelab.checkpoints import Checkpoint, TensorSource
from mergelab.merging.scopes import ScopedSlice, Source
from mergelab.merging.vocabulary.embeddings import input_embedding, is_token_tensor
from mergelab.operators.declare import Operator

__all__ = ["Ingredients", "find_tensor", "outcome"]

_PASSES_LONE = frozenset({"slerp", "nuslerp", "arcee_fusion"})


@dataclass(frozen=True)
class Ingredients:
    """The tensors of one output tensor that exist.

    Attributes:
        inputs: the models that have it, with what they have.
        base: the base model's tensor, or None.
    """

    inputs: tuple[tuple[Source, TensorSource], ...]
    base: TensorSource | None


def find_tensor(checkpoint: Checkpoint, name: str) -> TensorSource | None:
    """A model's tensor, or, for a head or embedding it lacks, the input embedding it shares weights with."""
    found = checkpoint.tensors.get(name)
    if found is None and is_token_tensor(name) and name.endswith(".weight"):
        return input_embedding(checkpoint)
    return found


def outcome(operator: Operator, piece: ScopedSlice, found: Ingredients) -> tuple[str, Sequence[TensorSource]]:
    """Decides what to do: `("merge", ...)`, `("copy", [one tensor])`, `("skip", [])` or `("fault", [])`.

    slerp, nuslerp and arcee_fusion pass a lone tensor through, nearswap only the base's; model_stock falls
    back to the base, or makes nothing; all others work on what is there, but need the base's tensor if they
    need a base.
    """
    inputs = [tensor for _, tensor in found.inputs]
    needs_base = operator.base == "required" or (operator.base == "optional" and piece.base is not None)
    if needs_base and found.base is None:
        if operator.name in _PASSES_LONE and len(inputs) == 1:
            return "copy", inputs
        return ("skip" if operator.name == "model_stock" else "fault"), []
    too_few = len(inputs) < operator.min_models
    if found.base is not None and (not inputs or (too_few and operator.name == "model_stock")):
        return "copy", [found.base]
    if too_few:
        return ("copy", inputs) if operator.name in _PASSES_LONE else ("fault", [])
    return "merge", inputs
