"""From activations to the codes of the k latents with the largest pre-activations, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae.shards import Shards
from mergelab.sae.sparse.codes import Codes, DenseCodes, SparseCodes
from mergelab.sae.sparse.rows import add_rows, sum_of_rows
from mergelab.sae.sparse.search import pre_activations, search
from mergelab.sae.sparse.top_k import Largest, largest, top_k

__all__ = ["prefers_dense", "top_k_codes"]

_DENSE_BELOW = 32
"""Latents per active latent under which dense codes are faster on a CPU (benchmarks/sae_step.py)."""


def prefers_dense(n_latents: int, k: int, platform: str) -> bool:
    """Whether dense, masked codes are the faster of the two ways for a dictionary of this shape."""
    return platform == "tpu" or (platform == "cpu" and n_latents < _DENSE_BELOW * k)


def _best(x: Array, encoder: Array, bias: Array, k: int, shards: Shards, compute_dtype: str) -> Largest:
    found = search(x, encoder, bias, min(k, encoder.shape[0]), shards.platform, compute_dtype)
    return largest(*found, k, shards)


def _forward(
    x: Array, encoder: Array, bias: Array, k: int, shards: Shards, compute_dtype: str
) -> tuple[Largest, tuple[Array, Array, Array]]:
    best = _best(x, encoder, bias, k, shards, compute_dtype)
    return best, (x, encoder, best.indices)


def _backward(
    k: int, shards: Shards, compute_dtype: str, saved: tuple[Array, Array, Array], g: Largest
) -> tuple[Array, Array, Array]:
    x, encoder, indices = saved
    n = encoder.shape[0]
    return (
        sum_of_rows(g.values, indices, encoder, shards.platform),
        add_rows(g.values, indices, x, n, shards.platform),
        jnp.zeros(n, g.values.dtype).at[indices].add(g.values),
    )


_differentiable_best = jax.custom_vjp(_best, nondiff_argnums=(3, 4, 5))
_differentiable_best.defvjp(_forward, _backward)


def top_k_codes(
    x: Array,
    encoder: Array,
    bias: Array,
    ks: Sequence[int | Array],
    k_max: int,
    shards: Shards,
    *,
    dense: bool,
    compute_dtype: str = "float32",
) -> list[Codes]:
    """The codes that keep the k largest pre-activations of each token and rectify them, for several k.

    Args:
        x: `[tokens, d_in]`, centred.
        encoder: `[n, d_in]`, this shard's rows.
        bias: `[n]`.
        ks: how many latents to keep, over all shards; may be traced.
        k_max: the largest of them.
        shards: the mesh axes.
        dense: whether to return dense codes.
        compute_dtype: see `search` and, for dense codes, `pre_activations`.

    Returns:
        Codes for each of `ks`. Ties go to the lowest latent.
    """
    if not dense:
        best = cast(Largest, _differentiable_best(x, encoder, bias, k_max, shards, compute_dtype))
        values = jnp.maximum(best.values, 0)
        return [
            SparseCodes(jnp.where(best.among(k), values, 0), best.indices, encoder.shape[0], shards)
            for k in ks
        ]
    pre = pre_activations(x, encoder, bias, compute_dtype)
    found = top_k(lax.stop_gradient(pre), min(k_max, pre.shape[1]), shards.platform)
    best = largest(*found, k_max, shards)
    return [DenseCodes(jnp.where(_kept(pre, best, k), jnp.maximum(pre, 0), 0), shards) for k in ks]


def _kept(pre: Array, best: Largest, k: int | Array) -> Array:
    """`[tokens, n]`, bool: the elements of `pre` that `best` keeps, without a scatter."""
    kept = best.among(k)
    last = jnp.maximum(kept.sum(axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
    value = jnp.take_along_axis(best.values, last, axis=1)
    index = jnp.take_along_axis(best.indices, last, axis=1)
    places = jnp.arange(pre.shape[1], dtype=jnp.int32)[None, :]
    chosen = (pre > value) | ((pre == value) & (places <= index))
    return chosen & kept[:, :1]  # a shard may keep none
