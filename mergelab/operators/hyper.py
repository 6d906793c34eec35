"""Hyper-parameters as builders receive them, normalised to pytree leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["exact", "is_concrete", "total_weight", "weights"]


def is_concrete(*values: Any) -> bool:
    """Whether none of the values is being traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def weights(values: Any) -> Any:
    """A float32 scalar or vector: what is only ever used in float32 arithmetic."""
    if is_concrete(values):
        return np.asarray(values, np.float32)
    if isinstance(values, (list, tuple)):
        return jnp.stack([jnp.asarray(v, jnp.float32) for v in values])
    return jnp.asarray(values, jnp.float32)


def exact(values: Any) -> Any:
    """A fraction that is also counted with: Python floats are kept, sequences become tuples."""
    return tuple(values) if isinstance(values, list) else values


def total_weight(values: Any) -> float:
    """The sum of concrete weights as float32 arithmetic sees it; 1.0 for a traced value."""
    if not is_concrete(values):
        return 1.0
    return float(np.sum(np.atleast_1d(np.asarray(values, np.float32)), dtype=np.float32))
