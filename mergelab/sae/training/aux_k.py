"""AuxK: dead latents learn to explain what the others leave (arXiv 2406.04093, A.2).

The dead latents are gathered first, so the cost goes with their number, not with the SAE's; when none
is dead nothing is computed. The error they explain is held fixed, so the rest of the loss is not touched:
this adds its own value and gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.largest import kth_largest, pre_activations
from mergelab.sae.kernels.rows import apply_one, row_dot
from mergelab.sae.variants.variant import SAEParams, Variant

__all__ = ["aux_k_gradients"]

Outcome = tuple[Array, SAEParams]
"""The auxiliary loss, and gradients."""

_PER_LATENT = ("encoder", "encoder_bias", "decoder")


def _capacities(n: int) -> list[int]:
    """Sizes for which a program is compiled: the dead are gathered into the smallest that holds them."""
    sizes = []
    size = 256
    while size < n:
        sizes.append(size)
        # What is cheap anyway need not be cut to measure.
        size *= 4 if size < 1024 else 2
    return [*sizes, n]


def aux_k_gradients(
    variant: Variant,
    params: SAEParams,
    grads: SAEParams,
    dead: Array,
    x: Array,
    error: Array,
    *,
    k: int,
    coefficient: float,
    tokens: int,
    shards: Shards,
    compute_dtype: str = "float32",
) -> tuple[Array, SAEParams]:
    """The auxiliary loss, and the gradients with its own added.

    The k dead latents with the largest pre-activations reconstruct the error; the loss is that
    reconstruction's mean squared error over the variance of the error in this batch.

    Args:
        variant: says whether inputs are centered by the decoder's bias.
        params: this device's shard.
        grads: gradients of the main loss, shares of a sum over shards of the batch.
        dead: `[n]`, bool.
        x: `[tokens, d_in]`, this device's tokens, not centered.
        error: `[tokens, d_out]`, target minus reconstruction.
        k: number of dead latents a token uses, over all shards.
        coefficient: weight of the loss.
        tokens: tokens in the batch over all devices.
        shards: the mesh axes.
        compute_dtype: dtype of the factors of the encoder's product.

    Returns:
        This device's share of the loss before its coefficient, and the gradients.
    """
    n = dead.shape[0]
    error = lax.stop_gradient(error)
    mean = shards.sum_data(error.sum(axis=0)) / tokens
    spread = error - mean[None, :]
    variance = shards.sum_data(row_dot(spread, spread).sum())
    scale = jnp.where(variance > 0, 1 / jnp.maximum(variance, 1e-30), 0.0)

    ranking = variant.activation

    def loss(rows: SAEParams, shared: SAEParams, held: Array) -> Array:
        # The gradient of what centers the inputs is a sum over tokens, so it is taken through a bias that is
        # zero: through the inputs it would be a product of their size.
        centered = lax.stop_gradient(variant.center(shared, x, shards))
        moved = variant.center(shared, jnp.zeros_like(x[:1]), shards)
        nothing = (moved - lax.stop_gradient(moved)) @ lax.stop_gradient(rows["encoder"]).T
        pre = pre_activations(centered, rows["encoder"], rows["encoder_bias"] + nothing[0], compute_dtype)
        # Places that hold no dead latent have no codes and no gradient.
        codes = jnp.where(held[None, :], ranking.kept(pre), 0)
        sizes = codes if ranking.score is None else ranking.score(codes)
        least = kth_largest(
            sizes, k, lambda flags: shards.sum_latents(flags.sum(axis=1, dtype=jnp.int32, keepdims=True))
        )
        codes = jnp.where(sizes >= least, codes, 0)
        miss = error - shards.join_latents(codes @ rows["decoder"])
        return row_dot(miss, miss).sum() * scale

    def with_aux_k(capacity: int) -> Callable[[Outcome], Outcome]:
        def run(outcome: Outcome) -> Outcome:
            _, grads = outcome
            (places,) = jnp.nonzero(dead, size=capacity, fill_value=n)
            rows = {name: params[name].at[places].get(mode="clip") for name in _PER_LATENT}
            shared = {"decoder_bias": params["decoder_bias"]}
            value, (own, common) = jax.value_and_grad(loss, argnums=(0, 1))(rows, shared, places < n)
            added = {
                name: grads[name].at[places].add(coefficient * own[name], mode="drop") for name in _PER_LATENT
            }
            bias = grads["decoder_bias"] + coefficient * common["decoder_bias"]
            return value, {**grads, **added, "decoder_bias": bias}

        return run

    if k == 0 or coefficient == 0:
        return jnp.zeros(()), grads
    capacities = _capacities(n)
    most = shards.most(dead.sum(dtype=jnp.int32))
    choice = jnp.searchsorted(jnp.array(capacities, jnp.int32), most)

    def any_dead(outcome: Outcome) -> Outcome:
        return apply_one(choice, [with_aux_k(capacity) for capacity in capacities], outcome, shards.platform)

    return lax.cond(most > 0, any_dead, lambda outcome: outcome, (jnp.zeros(()), grads))
