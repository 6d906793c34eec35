"""Sums and updates of the rows of a matrix that few codes touch.

Each computation has its plain form and, beside it, the form that XLA's CPU backend needs (`Forms`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.dispatch import Forms

__all__ = ["add_rows", "apply_one", "dot_with_rows", "row_dot", "sum_of_rows", "update_rows"]


def row_dot(a: Array, b: Array) -> Array:
    """Inner products of corresponding rows: `[rows, d]`, `[rows, d]` -> `[rows]`."""
    product = a * b
    # Times ones, not a sum: XLA on a CPU adds along the contiguous axis one by one, in one thread.
    return product @ jnp.ones(product.shape[1], product.dtype)


def sum_of_rows(weights: Array, indices: Array, matrix: Array, platform: str = "cpu") -> Array:
    """`out[t] = sum_j weights[t, j] * matrix[indices[t, j]]`, in the order of j.

    Args:
        weights: `[tokens, k]`.
        indices: `[tokens, k]`, int32, in range.
        matrix: `[n, d]`.
        platform: platform that the program is compiled for.

    Returns:
        `[tokens, d]`.
    """
    return SUM_OF_ROWS.on(platform)(weights, indices, matrix)


def _sum_at_once(weights: Array, indices: Array, matrix: Array) -> Array:
    return (weights[:, :, None] * matrix.at[indices].get(mode="promise_in_bounds")).sum(axis=1)


def _sum_by_columns(weights: Array, indices: Array, matrix: Array) -> Array:
    """One pass over `tokens * k` rows; nothing of that size is stored."""
    tokens, k = weights.shape
    at_once = next(step for step in (4, 2, 1) if k % step == 0)

    def add(step: Array, total: Array) -> Array:
        for j in range(at_once):
            column = step * at_once + j
            total = total + weights[:, column, None] * matrix.at[indices[:, column]].get(
                mode="promise_in_bounds"
            )
        return total

    return lax.fori_loop(0, k // at_once, add, jnp.zeros((tokens, matrix.shape[1]), matrix.dtype))


SUM_OF_ROWS = Forms(reference=_sum_at_once, cpu=_sum_by_columns)


def dot_with_rows(x: Array, indices: Array, matrix: Array, platform: str = "cpu") -> Array:
    """`out[t, j] = x[t] . matrix[indices[t, j]]`: `[tokens, d]`, `[tokens, k]`, `[n, d]` -> `[tokens, k]`."""
    return DOT_WITH_ROWS.on(platform)(x, indices, matrix)


def _dot_at_once(x: Array, indices: Array, matrix: Array) -> Array:
    return (x[:, None, :] * matrix.at[indices].get(mode="promise_in_bounds")).sum(axis=-1)


def _dot_by_columns(x: Array, indices: Array, matrix: Array) -> Array:
    return lax.map(lambda column: row_dot(x, matrix.at[column].get(mode="promise_in_bounds")), indices.T).T


DOT_WITH_ROWS = Forms(reference=_dot_at_once, cpu=_dot_by_columns)


def add_rows(weights: Array, indices: Array, x: Array, n: int, platform: str = "cpu") -> Array:
    """`out[i] = sum of weights[t, j] * x[t] over all (t, j) with indices[t, j] == i`.

    Args:
        weights: `[tokens, k]`.
        indices: `[tokens, k]`, int32, in range.
        x: `[tokens, d]`.
        n: rows of the result.
        platform: platform that the program is compiled for.

    Returns:
        `[n, d]`: the transpose of `sum_of_rows` with respect to the matrix.
    """
    # Zeros that XLA cannot tell from others: it would make those of several sums once, and copy them.
    zeros = jnp.full((n, x.shape[1]), jnp.minimum(jnp.abs(weights[0, 0]), 0), x.dtype)
    return ADD_ROWS.on(platform)(zeros, weights, indices, x)


def _add_at_once(zeros: Array, weights: Array, indices: Array, x: Array) -> Array:
    return zeros.at[indices].add(weights[:, :, None] * x[:, None, :], mode="promise_in_bounds")


def _add_by_columns(zeros: Array, weights: Array, indices: Array, x: Array) -> Array:
    def add(j: Array, total: Array) -> Array:
        return total.at[indices[:, j]].add(weights[:, j, None] * x, mode="promise_in_bounds")

    return lax.fori_loop(0, weights.shape[1], add, zeros)


ADD_ROWS = Forms(reference=_add_at_once, cpu=_add_by_columns)


RowFunction = Callable[..., Sequence[Array]]
"""A function of `[rows, d]` arrays, for any number of rows, that treats each row by itself."""


def update_rows(
    function: RowFunction, updated: Sequence[Array], read: Sequence[Array], after: Array, shards: Shards
) -> tuple[Array, ...]:
    """`function(*updated, *read)`, in the memory of `updated` where nothing else needs that.

    Args:
        function: treats each row by itself; returns one array for each of `updated`.
        updated: `[n, d]`, the arrays that the results replace; `[n]` are treated as a whole.
        read: `[n, d]` each.
        after: float, a scalar made of the arrays as they were, such as a norm: it is computed first, so that
            nothing has to keep a copy of them.
        shards: the mesh axes.
    """
    # In a sweep's vmapped program a choice computes both sides.
    plain = updated[0].ndim != 2 or shards.sweep is not None
    form = UPDATE_ROWS.reference if plain else UPDATE_ROWS.on(shards.platform)
    return form(function, updated, read, after)


def _rows_at_once(
    function: RowFunction, updated: Sequence[Array], read: Sequence[Array], after: Array
) -> tuple[Array, ...]:
    return tuple(function(*updated, *read))


_BLOCK_BYTES = 2**20
"""What a block of rows takes, of one array: enough to be worth a turn, while a turn's arrays fit in cache."""


def _rows_in_blocks(
    function: RowFunction, updated: Sequence[Array], read: Sequence[Array], after: Array
) -> tuple[Array, ...]:
    """One block of rows after the other: what the function computes on its way stays in the CPU's cache."""
    # True, but only known once `after` is: a block is then cut out once, and used from there.
    ready = (after >= 0) | jnp.isnan(after)
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


UPDATE_ROWS = Forms(reference=_rows_at_once, cpu=_rows_in_blocks)


Tree = TypeVar("Tree")


def apply_one(
    choice: Array, branches: Sequence[Callable[[Tree], Tree]], operand: Tree, platform: str
) -> Tree:
    """`branches[choice](operand)`, where branches change a few rows of large arrays."""
    return APPLY_ONE.on(platform)(choice, branches, operand)


def _switch(choice: Array, branches: Sequence[Callable[[Any], Any]], operand: Any) -> Any:
    """One decision, as the host takes part in each."""
    return lax.switch(choice, branches, operand)


def _one_by_one(choice: Array, branches: Sequence[Callable[[Any], Any]], operand: Any) -> Any:
    """A choice among several would copy the arrays on a CPU; one between a branch and nothing does not."""
    for place, branch in enumerate(branches):
        operand = lax.cond(choice == place, branch, lambda same: same, operand)
    return operand


APPLY_ONE = Forms(reference=_switch, cpu=_one_by_one)
