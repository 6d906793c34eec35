"""Sums over a text that keep what their additions round off, and the likelihood whose gradients they sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.activations.kept import short_enough
from mergelab.errors import NonFiniteError

__all__ = ["add_rounded", "check_finite", "log_likelihood", "mean_of_sums", "squared_rows"]


def add_rounded(sums: tuple[Any, Any], added: Any) -> tuple[Any, Any]:
    """Sums, and what their additions have rounded off so far (Neumaier 1974), with one more term."""
    total = jax.tree.map(jnp.add, sums[0], added)

    def lost(before: Array, term: Array, after: Array, so_far: Array) -> Array:
        taken = after - before
        return so_far + ((before - (after - taken)) + (term - taken))

    return total, jax.tree.map(lost, sums[0], added, total, sums[1])


def mean_of_sums(total: Array, lost: Array, count: int) -> Array:
    """The mean of `count` terms, from `add_rounded`'s sums."""
    return (total + lost) / jnp.float32(count)


def log_likelihood(
    logits: Float[Array, "length vocab"],
    tokens: Int[Array, " length"],
    mask: Bool[Array, " length"],
    kept: Bool[Array, " length"],
) -> Float[Array, ""]:
    """`sum of ln p(token | the tokens before it)` of one sequence, over tokens that are kept."""
    logits = logits[:-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(mask[:-1] & kept[1:], chosen - jax.nn.logsumexp(logits, axis=-1), 0.0))


@jax.jit
def squared_rows(
    x: Float[Array, "batch length *width"], kept: Bool[Array, "batch length"], limit: Float[Array, ""] | None
) -> tuple[Float[Array, "width width"], Int[Array, ""]]:
    """`x^T x` over the rows that count, and their number."""
    rows = x.astype(jnp.float32).reshape(kept.size, -1)
    counted = kept.reshape(-1)
    if limit is not None:
        counted = counted & short_enough(rows, limit)
    rows = jnp.where(counted[:, None], rows, 0.0)
    return jnp.matmul(rows.T, rows, precision="highest"), counted.sum(dtype=jnp.int32)


def check_finite(grams: Mapping[str, np.ndarray]) -> None:
    """Checks the Gram matrices of sites.

    Raises:
        NonFiniteError: a site holds NaN or infinity.
    """
    for site, matrix in grams.items():
        if not np.isfinite(matrix).all():
            raise NonFiniteError(f"activations of the site {site!r} are not finite; try float32 weights")
