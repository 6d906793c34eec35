"""The normalisation of OpenAI's released autoencoders: each token by itself."""

from __future__ import annotations

from jax import Array

__all__ = ["layer_norm"]

_EPS = 1e-5


def layer_norm(x: Array) -> tuple[Array, Array, Array]:
    """Each token less its mean over the width, divided by its unbiased standard deviation + 1e-5.

    Args:
        x: `[tokens, d]`, d at least 2.

    Returns:
        The normalised tokens, and what undoes it: means and scales `[tokens, 1]`.
    """
    mean = x.mean(axis=-1, keepdims=True)
    scale = x.std(axis=-1, keepdims=True, ddof=1) + _EPS
    return (x - mean) / scale, mean, scale
