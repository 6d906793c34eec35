"""Candidates of a soup: named parameter trees, or loaders that fetch one only while it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from mergelab.errors import EvaluationError

__all__ = ["Candidates", "Loader", "load_weights", "loaders"]

Loader = Callable[[], PyTree[Array]]
"""Returns one candidate's parameters; called each time they are needed, so nothing else need hold them."""

Candidates = Mapping[str, Any] | Sequence[Any]
"""Parameter trees, loaders or checkpoint paths: by name, or in order (named `model_0`, `model_1`, ...)."""


def loaders(candidates: Candidates) -> dict[str, Loader]:
    """Returns one loader per candidate, by name.

    A string or path is a checkpoint folder, read into `{tensor name: array}`; a callable that is not itself
    a pytree node is a loader; anything else is the parameter tree.

    Raises:
        EvaluationError: there are no candidates.
    """
    if not candidates:
        raise EvaluationError("A soup needs at least one candidate; none was given.")
    if isinstance(candidates, Mapping):
        return {str(name): _loader(candidate) for name, candidate in candidates.items()}
    width = len(str(len(candidates) - 1))
    return {f"model_{i:0{width}}": _loader(candidate) for i, candidate in enumerate(candidates)}


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint folder as an array, by name.

    Raises:
        CheckpointError: the folder is missing, malformed or unsafe to read.
    """
    from mergelab.checkpoints import open_checkpoint, read_whole

    return {name: read_whole(source) for name, source in open_checkpoint(path).tensors.items()}


def _loader(candidate: Any) -> Loader:
    if isinstance(candidate, str | Path):
        return partial(load_weights, candidate)
    # A callable pytree node (a module object) is parameters; only a callable *leaf* is a loader.
    if callable(candidate) and jax.tree_util.all_leaves([candidate]):
        return candidate
    return lambda: candidate
