"""Attention with linear biases (Press et al., arXiv:2108.12409): scores fall with distance, by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Alibi", "alibi_slopes", "distance_bias"]


@dataclass(frozen=True)
class Alibi:
    """Slopes by which scores fall with distance.

    Attributes:
        slopes: what a score loses for each token between key and query, by head.
        scale: what the biases are multiplied with.
        rounded: whether slopes, and slopes times positions, are rounded to bfloat16 before that (Falcon).
    """

    slopes: tuple[float, ...]
    scale: float = 1.0
    rounded: bool = False


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of the paper: a geometric sequence from `2^(-8/n)`, `n` the largest power of 2 in `heads`.

    Heads beyond `n` have every other slope of the sequence for `2 n`.
    """
    largest = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / largest) for i in range(largest)]
    return (*first, *(2.0 ** (-4 * (2 * i + 1) / largest) for i in range(heads - largest)))


def distance_bias(
    alibi: Alibi, queries: Int[Array, "rows query"], keys: Int[Array, "rows key"]
) -> Float[Array, "rows heads #query key"]:
    """What is added to scores, float32; up to a constant of each query, which a softmax does not see.

    Args:
        alibi: the slopes.
        queries: position of each query, counted over real tokens.
        keys: position of each key.
    """
    if alibi.rounded:
        # The product of a position is rounded, so that no difference of positions gives it.
        slopes = jnp.asarray(np.asarray(alibi.slopes, np.float32)).astype(jnp.bfloat16)
        product = slopes[None, :, None] * keys[:, None].astype(jnp.bfloat16)
        return product.astype(jnp.float32)[:, :, None] * alibi.scale
    slopes = jnp.asarray(np.asarray(alibi.slopes, np.float32) * np.float32(alibi.scale))
    distance = (keys[:, None] - queries[:, :, None]).astype(jnp.float32)
    return slopes[None, :, None, None] * distance[:, None]
