"""What readers and writers of other libraries' files share: biases moved, what does not fit refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.checkpoints import TensorSource, read_whole
from mergelab.errors import CheckpointError, SAEError
from mergelab.sae.dictionary import Dictionary

__all__ = ["arrays_of", "refuse", "subtracting_b_dec", "transposed"]


def subtracting_b_dec(dictionary: Dictionary) -> Dictionary:
    """The same dictionary in the form that subtracts `b_dec` from its input before it encodes it."""
    if dictionary.config.subtract_b_dec:
        return dictionary
    config = replace(dictionary.config, subtract_b_dec=True)
    return replace(dictionary, b_enc=dictionary.b_enc + dictionary.b_dec @ dictionary.W_enc, config=config)


def arrays_of(
    tensors: Mapping[str, TensorSource], wanted: Mapping[str, bool], path: Path
) -> dict[str, Array]:
    """Tensors by name, in float32.

    Args:
        tensors: of a file.
        wanted: names to read, and whether they must be there.
        path: of the file, for the message.

    Raises:
        CheckpointError: one that must be there is not.
    """
    missing = [name for name, needed in wanted.items() if needed and name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: has no tensor {missing[0]!r}, only {', '.join(sorted(tensors))}; of another format?"
        )
    return {name: jnp.asarray(read_whole(tensors[name]), jnp.float32) for name in wanted if name in tensors}


def transposed(array: Array | np.ndarray) -> np.ndarray:
    """The transpose, contiguous, float32."""
    return np.ascontiguousarray(np.asarray(array, np.float32).T)


def refuse(format: str, what: str, others: str) -> SAEError:
    """The error for a dictionary that a format cannot express."""
    return SAEError(f"the format {format!r} has no place for {what}; export to {others}.")
