"""Leaves latents out of a dictionary without changing its shape, for sweeps over the number of latents."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mergelab.sae.variants.variant import Context, Params

__all__ = ["live_bias"]


def live_bias(params: Params, context: Context) -> Array:
    """The encoder's bias `[n]`, so low for latents that take no part that they never fire."""
    bias = params["encoder_bias"]
    return bias if context.live is None else jnp.where(context.live, bias, jnp.finfo(bias.dtype).min)
