"""Products of each token with the matrices of its own experts alone.

Tokens are sorted by expert into blocks of a fixed number of rows, each of one expert; the last block of an
expert is padded. On a CPU, where XLA's `ragged_dot` multiplies every row with every expert, a loop goes over
the blocks that hold anything; elsewhere `ragged_dot` does.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mergelab.models.layers.bfloat16_bits import StackedBits

__all__ = ["ChoicePlaces", "combine", "gather", "in_blocks", "in_rows", "products", "rows_of_a_block"]

_MOST = 128


class ChoicePlaces(NamedTuple):
    """Where each choice of each token stands.

    Attributes:
        tokens: the token in each row, the number of tokens where a row is padding.
        owner: the expert of each block.
        used: how many blocks, the first ones, hold any token.
        sizes: rows of each expert, padding among them.
        places: the row of each choice, the number of rows where its expert is not here.
    """

    tokens: Int[Array, "blocks rows"]
    owner: Int[Array, " blocks"]
    used: Int[Array, ""]
    sizes: Int[Array, " experts"]
    places: Int[Array, "tokens chosen"]


def rows_of_a_block(choices: int, experts: int) -> int:
    """A power of two near half of what an expert gets: shorter blocks read matrices more often."""
    share = choices // (2 * experts)
    return min(_MOST, 1 << max(share - 1, 0).bit_length())


def in_blocks(indices: Int[Array, "tokens chosen"], experts: int, rows: int) -> ChoicePlaces:
    """Sorts choices by expert.

    Args:
        indices: the chosen experts; `experts` for one that is elsewhere.
        experts: number of experts.
        rows: rows of a block.
    """
    count, chosen = indices.shape
    flat = indices.reshape(-1)
    choices = count * chosen
    blocks = choices // rows + min(experts, choices)
    numbers = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)
    filled = -(-numbers // rows)
    order = jnp.argsort(flat, stable=True)
    owners = flat[order]
    rank = jnp.arange(choices, dtype=jnp.int32) - (jnp.cumsum(numbers) - numbers)[owners]
    ends = jnp.cumsum(filled)
    place = jnp.where(owners < experts, (ends - filled)[owners] * rows + rank, blocks * rows)
    tokens = jnp.full(blocks * rows, count, jnp.int32).at[place].set(order // chosen, mode="drop")
    owner = jnp.searchsorted(ends[:experts], jnp.arange(blocks, dtype=jnp.int32), side="right")
    places = jnp.zeros(choices, jnp.int32).at[order].set(place)
    return ChoicePlaces(
        tokens.reshape(blocks, rows),
        jnp.minimum(owner, experts - 1).astype(jnp.int32),
        ends[experts - 1],
        filled[:experts] * rows,
        places.reshape(count, chosen),
    )


def gather(x: Float[Array, "tokens width"], blocks: ChoicePlaces) -> Float[Array, "blocks rows width"]:
    """The vector of the token in each row, zeros in padding."""
    return jnp.take(x, blocks.tokens, axis=0, mode="fill", fill_value=0)


def in_rows(weights: Float[Array, "tokens chosen"], blocks: ChoicePlaces) -> Float[Array, "blocks rows"]:
    """The weight of the choice in each row, zero in padding."""
    rows = jnp.zeros(blocks.tokens.size, weights.dtype)
    return (
        rows.at[blocks.places.reshape(-1)].set(weights.reshape(-1), mode="drop").reshape(blocks.tokens.shape)
    )


def combine(
    y: Float[Array, "blocks rows width"], blocks: ChoicePlaces, weights: Float[Array, "tokens chosen"]
) -> Float[Array, "tokens width"]:
    """The weighted sum of what its experts make of each token, float32."""
    rows = y.reshape(-1, y.shape[-1])
    found = jnp.take(rows, blocks.places, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("tcw,tc->tw", found.astype(jnp.float32), weights)


def products(
    x: Float[Array, "blocks rows width"],
    kernels: Float[Array, "experts width hidden"] | StackedBits,
    blocks: ChoicePlaces,
) -> Float[Array, "blocks rows hidden"]:
    """The rows of each block times the matrix of its expert; anything in blocks that are not used."""
    if isinstance(kernels, StackedBits):
        return kernels.by_block(x, blocks.owner, blocks.used)

    def ragged(x: Array, kernels: Array, owner: Array, used: Array, sizes: Array) -> Array:
        y = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1]), kernels, sizes)
        return y.reshape(*x.shape[:2], -1)

    def looped(x: Array, kernels: Array, owner: Array, used: Array, sizes: Array) -> Array:
        return _one_by_one(x, kernels, owner, used, False)

    arguments = (x, kernels, blocks.owner, blocks.used, blocks.sizes)
    return jax.lax.platform_dependent(*arguments, cpu=looped, default=ragged)


# The two products below are each other's derivatives, so that gradients too skip what is not chosen. A loop
# with a number of turns that is not known beforehand has none of its own.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _one_by_one(x: Array, kernels: Array, owner: Array, used: Array, transposed: bool) -> Array:
    """Each block times its expert's matrix, or the transposed matrix."""

    def one(n: Array, found: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, owner[n], keepdims=False)
        rows = jax.lax.dynamic_index_in_dim(x, n, keepdims=False)
        product = rows @ (kernel.T if transposed else kernel)
        return jax.lax.dynamic_update_index_in_dim(found, product, n, 0)

    features = kernels.shape[1 if transposed else 2]
    empty = jnp.zeros((*x.shape[:2], features), x.dtype)
    return jax.lax.fori_loop(jnp.int32(0), used, one, empty)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _outer(x: Array, y: Array, owner: Array, used: Array, experts: int) -> Array:
    """The sum of `x^T y` over the rows of each expert: `[experts, width, hidden]`."""

    def one(n: Array, found: Array) -> Array:
        ours = jax.lax.dynamic_index_in_dim(x, n, keepdims=False)
        product = ours.T @ jax.lax.dynamic_index_in_dim(y, n, keepdims=False)
        before = jax.lax.dynamic_index_in_dim(found, owner[n], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(found, before + product, owner[n], 0)

    empty = jnp.zeros((experts, x.shape[-1], y.shape[-1]), x.dtype)
    return jax.lax.fori_loop(jnp.int32(0), used, one, empty)


def _keep_one_by_one(x: Array, kernels: Array, owner: Array, used: Array, transposed: bool):
    return _one_by_one(x, kernels, owner, used, transposed), (x, kernels, owner, used)


def _of_one_by_one(transposed: bool, kept: tuple[Array, ...], given: Array):
    x, kernels, owner, used = kept
    back = _one_by_one(given, kernels, owner, used, not transposed)
    pair = (given, x) if transposed else (x, given)
    return back, _outer(*pair, owner, used, kernels.shape[0]), None, None


def _keep_outer(x: Array, y: Array, owner: Array, used: Array, experts: int):
    return _outer(x, y, owner, used, experts), (x, y, owner, used)


def _of_outer(experts: int, kept: tuple[Array, ...], given: Array):
    x, y, owner, used = kept
    return (
        _one_by_one(y, given, owner, used, True),
        _one_by_one(x, given, owner, used, False),
        None,
        None,
    )


_one_by_one.defvjp(_keep_one_by_one, _of_one_by_one)
_outer.defvjp(_keep_outer, _of_outer)
