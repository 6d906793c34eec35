"""AbsTopK: the codes of largest absolute value, with their signs (arXiv 2510.00404)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.sae import activation_functions
from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Context, SAEParams

__all__ = ["AbsTopK"]


@dataclass(frozen=True)
class AbsTopK(TopK):
    """TopK by absolute value: a latent stands for a direction and its opposite.

    Attributes:
        k: latents per token.
    """

    name: ClassVar[str] = "abs_topk"
    activation = activation_functions.AbsTopKFunction

    def encoder(self, params: SAEParams, context: Context) -> tuple[Array, Array]:
        encoder, bias = params["encoder"], params["encoder_bias"]
        if context.alive is None:
            return encoder, bias
        # A low bias would be large here: pre-activations of 0 are the smallest.
        return jnp.where(context.alive[:, None], encoder, 0), jnp.where(context.alive, bias, 0)
