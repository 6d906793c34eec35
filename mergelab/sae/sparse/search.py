"""Finds the k largest pre-activations of each token without storing those of a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae.sparse.rows import dot_with_rows
from mergelab.sae.sparse.top_k import top_k

__all__ = ["pre_activations", "search"]

_PIECE_ROWS = {"cpu": 256}
"""Tokens at a time: touching new memory for the pre-activations of all of them costs a CPU more than the
products of small pieces do (benchmarks/sae_step.py)."""

_PIECE_BYTES = {"cpu": 1 << 26}
_LARGE_PIECE_BYTES = 1 << 30
"""Of the pre-activations held at a time. An accelerator wants large products, but has only so much memory."""

_SPARE = 4
"""With half-precision screening, `k / _SPARE` more candidates than k are scored again in float32."""


def pre_activations(x: Array, encoder: Array, bias: Array, compute_dtype: str = "float32") -> Array:
    """`x @ encoder.T + bias`: `[tokens, d_in]`, `[n, d_in]`, `[n]` -> `[tokens, n]`, float32.

    Args:
        x: activations.
        encoder: rows of encoder weights.
        bias: of the latents.
        compute_dtype: what the factors of the product are rounded to; sums are float32.
    """
    product = lax.dot_general(
        x.astype(compute_dtype),
        encoder.astype(compute_dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return product + bias[None, :]


def search(
    x: Array, encoder: Array, bias: Array, k: int, platform: str, compute_dtype: str = "float32"
) -> tuple[Array, Array]:
    """The k largest pre-activations of each token.

    Args:
        x: `[tokens, d_in]`, centred.
        encoder: `[n, d_in]`.
        bias: `[n]`.
        k: how many, at most n.
        platform: what the program is compiled for.
        compute_dtype: other than float32, products in it only choose whom to look at; the values of these
            candidates, and the choice among them, are float32.

    Returns:
        Values `[tokens, k]`, falling, and indices `[tokens, k]`, int32. Ties go to the lowest index.
    """
    n = encoder.shape[0]
    rounded = encoder.astype(compute_dtype)  # once, not for each piece

    def find(x: Array) -> tuple[Array, Array]:
        pre = pre_activations(x, rounded, bias, compute_dtype)
        if compute_dtype == "float32":
            return top_k(pre, k, platform)
        _, candidates = top_k(pre, min(k + k // _SPARE, n), platform)
        candidates = jnp.sort(candidates, axis=-1)  # so that ties go to the lowest index
        exact = dot_with_rows(x, candidates, encoder, platform) + bias[candidates]
        values, places = top_k(exact, k, platform)
        return values, jnp.take_along_axis(candidates, places, axis=1)

    rows = max(_PIECE_BYTES.get(platform, _LARGE_PIECE_BYTES) // (4 * n), 1)
    return _in_pieces(find, x, min(rows, _PIECE_ROWS.get(platform, rows)))


def _in_pieces(
    function: Callable[[Array], tuple[Array, Array]], x: Array, at_once: int
) -> tuple[Array, Array]:
    """`function(x)`, for at most so many rows at a time."""
    tokens = x.shape[0]
    pieces = -(-tokens // at_once)
    if pieces == 1:
        return function(x)
    rows = -(-tokens // pieces)
    filled = jnp.pad(x, ((0, pieces * rows - tokens), (0, 0)))
    values, indices = lax.map(function, filled.reshape(pieces, rows, -1))
    k = values.shape[-1]
    return values.reshape(-1, k)[:tokens], indices.reshape(-1, k)[:tokens]
