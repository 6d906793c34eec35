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
from mergelab.sae.formats.settings import check_tensors

__all__ = ["arrays_of", "refuse", "subtracting_b_dec", "transposed"]


_MATRICES = frozenset(
    (
        "W_enc",
        "W_dec",
        "W_skip",
        "encoder.weight",
        "decoder.weight",
        "w_enc",
        "w_dec",
        "affine_skip_connection",
    )
)
"""The tensors of any format that have two axes; the others have one."""


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
        CheckpointError: one that must be there is not, or one holds no floats, or has other axes than its
            name says: two for weights, one for the rest.
    """
    check_tensors(path, tensors, {name: 2 if name in _MATRICES else 1 for name in wanted})
    missing = [name for name, needed in wanted.items() if needed and name not in tensors]
    if missing:
        known = ", ".join(sorted(tensors)[:20])
        raise CheckpointError(f"{path}: has no tensor {missing[0]!r}, only {known}; of another format?")
    return {name: jnp.asarray(read_whole(tensors[name]), jnp.float32) for name in wanted if name in tensors}


def transposed(array: Array | np.ndarray) -> np.ndarray:
    """The transpose, contiguous, float32."""
    return np.ascontiguousarray(np.asarray(array, np.float32).T)


def refuse(format: str, what: str, others: str) -> SAEError:
    """The error for a dictionary that a format cannot express."""
    return SAEError(f"the format {format!r} has no place for {what}; export to {others}.")
