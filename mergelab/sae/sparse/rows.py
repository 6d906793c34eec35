"""Sparse codes times a matrix, and the two transposes of that product, without storing `[tokens, k, d]`.

On a CPU each is a loop over k in which whole rows are gathered or added; on a GPU one fused kernel.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["add_rows", "dot_with_rows", "row_dot", "sum_of_rows"]


def row_dot(a: Array, b: Array) -> Array:
    """Inner products of corresponding rows: `[rows, d]`, `[rows, d]` -> `[rows]`."""
    product = a * b
    # Times ones, not a sum: XLA on a CPU adds along the contiguous axis one by one, in one thread.
    return product @ jnp.ones(product.shape[1], product.dtype)


def _steps(k: int) -> int:
    return next(step for step in (4, 2, 1) if k % step == 0)


def sum_of_rows(weights: Array, indices: Array, matrix: Array, platform: str = "cpu") -> Array:
    """`out[t] = sum_j weights[t, j] * matrix[indices[t, j]]`, in the order of j.

    Args:
        weights: `[tokens, k]`.
        indices: `[tokens, k]`, int32, in range.
        matrix: `[n, d]`.
        platform: what the program is compiled for.

    Returns:
        `[tokens, d]`. One pass over `tokens * k` rows; nothing of that size is stored.
    """
    if platform != "cpu":
        return (weights[:, :, None] * matrix.at[indices].get(mode="promise_in_bounds")).sum(axis=1)
    tokens, k = weights.shape
    at_once = _steps(k)

    def add(step: Array, total: Array) -> Array:
        for j in range(at_once):
            column = step * at_once + j
            total = total + weights[:, column, None] * matrix.at[indices[:, column]].get(
                mode="promise_in_bounds"
            )
        return total

    return lax.fori_loop(0, k // at_once, add, jnp.zeros((tokens, matrix.shape[1]), matrix.dtype))


def dot_with_rows(x: Array, indices: Array, matrix: Array, platform: str = "cpu") -> Array:
    """`out[t, j] = x[t] . matrix[indices[t, j]]`: `[tokens, d]`, `[tokens, k]`, `[n, d]` -> `[tokens, k]`."""
    if platform != "cpu":
        return (x[:, None, :] * matrix.at[indices].get(mode="promise_in_bounds")).sum(axis=-1)
    return lax.map(lambda column: row_dot(x, matrix.at[column].get(mode="promise_in_bounds")), indices.T).T


def add_rows(weights: Array, indices: Array, x: Array, n: int, platform: str = "cpu") -> Array:
    """`out[i] = sum of weights[t, j] * x[t] over all (t, j) with indices[t, j] == i`.

    Args:
        weights: `[tokens, k]`.
        indices: `[tokens, k]`, int32, in range.
        x: `[tokens, d]`.
        n: rows of the result.
        platform: what the program is compiled for.

    Returns:
        `[n, d]`: the transpose of `sum_of_rows` with respect to the matrix.
    """
    # Zeros that XLA cannot tell from others: it would make those of several sums once, and copy them.
    zeros = jnp.full((n, x.shape[1]), jnp.minimum(jnp.abs(weights[0, 0]), 0), x.dtype)
    if platform != "cpu":
        return zeros.at[indices].add(weights[:, :, None] * x[:, None, :], mode="promise_in_bounds")

    def add(j: Array, total: Array) -> Array:
        return total.at[indices[:, j]].add(weights[:, j, None] * x, mode="promise_in_bounds")

    return lax.fori_loop(0, weights.shape[1], add, zeros)
