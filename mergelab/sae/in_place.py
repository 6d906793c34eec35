"""Has XLA change arrays of the size of a parameter where they lie, instead of in copies of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array, lax

__all__ = ["update_rows"]

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
