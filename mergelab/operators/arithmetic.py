"""Float32 arithmetic that gives the same bits on every backend and in every compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["add_scaled", "coefficient", "rounded", "row_sum"]


@jax.custom_jvp
def rounded(product: jax.Array) -> jax.Array:
    """Returns `product` unchanged, but rounded to its dtype before anything is added to it.

    Compilers contract `a * b + c` into one fused operation, or not, as they see fit, so the same formula
    gives results one rounding apart in different programs. A comparison that no compiler can prove to
    be an identity keeps the two operations apart, at no measurable cost.
    """
    return jnp.where(product == product, product, jnp.full_like(product, jnp.nan))


@rounded.defjvp
def _rounded_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return rounded(primals[0]), tangents[0]


def coefficient(values: ArrayLike, position: int | None = None) -> jax.Array:
    """The float32 scalar at `position` of a hyper-parameter that is a scalar or a vector."""
    array = jnp.asarray(values, dtype=jnp.float32)
    return array if array.ndim == 0 or position is None else array[position]


def add_scaled(total: jax.Array | None, weight: jax.Array, x: jax.Array) -> jax.Array:
    """`total + weight * x` with the product rounded first; `total` None starts the sum."""
    term = rounded(weight * x)
    return term if total is None else total + term


def row_sum(x: jax.Array) -> jax.Array:
    """Sums the last axis, kept as length 1, by halving: `x[..., :h] + x[..., h:]` until one is left.

    The order of additions is spelled out, so it does not depend on how many rows are summed at once, and
    pairwise summation keeps the error at a few roundings.
    """
    while (n := x.shape[-1]) > 1:
        half = -(-n // 2)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, 2 * half - n)]
        x = jnp.pad(x, pad) if 2 * half > n else x
        x = x[..., :half] + x[..., half:]
    return x
