"""Normalizations that an SAE does itself: each token is brought to one scale, its reconstruction put back."""

from __future__ import annotations

from jax import Array
from jax import numpy as jnp

__all__ = ["NORMALIZATIONS", "constant_norm", "layer_norm", "normalized"]

_EPS = 1e-5


def layer_norm(x: Array) -> tuple[Array, Array, Array]:
    """Each token less its mean over the width, divided by its unbiased standard deviation + 1e-5.

    Args:
        x: `[tokens, d]`, d at least 2.

    Returns:
        The normalized tokens, and what undoes it: means and scales `[tokens, 1]`.
    """
    mean = x.mean(axis=-1, keepdims=True)
    scale = x.std(axis=-1, keepdims=True, ddof=1) + _EPS
    return (x - mean) / scale, mean, scale


def constant_norm(x: Array) -> tuple[Array, Array]:
    """Each token scaled to the norm `sqrt(d)`; a token of zeros stays.

    Args:
        x: `[tokens, d]`.

    Returns:
        The normalized tokens, and scales `[tokens, 1]` that undo it.
    """
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    scale = jnp.where(norm > 0, norm, 1) / jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype))
    return x / scale, scale


NORMALIZATIONS = ("none", "layer_norm", "constant_norm")


def normalized(kind: str, x: Array) -> tuple[Array, Array | None, Array | None]:
    """Tokens `[tokens, d]` in a normalization of `NORMALIZATIONS`, and what undoes it.

    Returns:
        The normalized tokens; means that were subtracted and scales by which was divided, `[tokens, 1]`, or
        None where nothing was.
    """
    if kind == "layer_norm":
        return layer_norm(x)
    if kind == "constant_norm":
        normal, scale = constant_norm(x)
        return normal, None, scale
    return x, None, None
