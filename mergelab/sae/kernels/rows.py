"""Sums and updates of the rows of a matrix that few codes touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["add_rows", "dot_with_rows", "row_dot", "sum_of_rows", "update_rows"]


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


_BLOCK_BYTES = 2**20
"""What a block of rows takes, of one array: enough to be worth a turn, while a turn's arrays fit in cache."""


def update_rows(
    function: Callable[..., Sequence[Array]], updated: Sequence[Array], read: Sequence[Array], ready: Array
) -> tuple[Array, ...]:
    """`function(*updated, *read)`, which treats each row by itself, over one block of rows after the other.

    On a CPU, whatever it computes on the way to its results so stays in cache; over whole arrays XLA
    would store it.

    Args:
        function: of `[rows, d]` arrays, for any number of rows; returns one for each of `updated`.
        updated: `[n, d]`, the arrays that the results replace.
        read: `[n, d]` each.
        ready: bool, scalar: true, without XLA being able to tell before everything is computed that has
            to see the arrays as they were. A block is then cut out once and used from there.

    Returns:
        The results, in the memory of `updated` where nothing else needs that.
    """
    n, d = updated[0].shape
    rows = max(_BLOCK_BYTES // (d * updated[0].dtype.itemsize), 1)
    if n <= rows:
        return tuple(function(*updated, *read))

    def move(start: Array | int, rows: int, updated: Sequence[Array]) -> tuple[Array, ...]:
        def cut(arrays: Sequence[Array]) -> tuple[Array, ...]:
            return tuple(lax.dynamic_slice_in_dim(array, start, rows) for array in arrays)

        blocks = lax.cond(
            ready,
            lambda updated, read: tuple(function(*updated, *read)),
            lambda updated, read: updated,
            cut(updated),
            cut(read),
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(array, block, start, 0)
            for array, block in zip(updated, blocks, strict=True)
        )

    result = lax.fori_loop(0, n // rows, lambda i, updated: move(i * rows, rows, updated), tuple(updated))
    return move(n - n % rows, n % rows, result) if n % rows else result
