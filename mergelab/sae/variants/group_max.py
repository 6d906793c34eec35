"""GroupMax: the largest code of each of k groups of neighboring latents (sparsify's `groupmax`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import DenseCodes, SparseCodes, prefers_dense
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Context, Encoded, SAEParams, alive_bias

__all__ = ["GroupMax"]


@dataclass(frozen=True)
class GroupMax(TopK):
    """TopK without a search: `k` groups of `n_latents / k` neighbors, of each the largest pre-activation.

    Two latents of one group never fire together.

    Attributes:
        k: number of groups, and so of latents per token; it divides `n_latents`.
    """

    name: ClassVar[str] = "group_max"
    activation = activation_functions.GroupMaxFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_latents % self.k:
            raise SAEError(
                f"k is {self.k}, which does not divide n_latents={self.n_latents}: group_max takes one "
                "latent of each of k equal groups."
            )

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        if context.k is not None:
            raise SAEError("the groups of group_max follow from k: a sweep has one k for all; vary others.")
        parts = context.shards.num_latent_shards()
        if self.k % parts:
            raise SAEError(
                f"k is {self.k}: {parts} shards of latents cannot have whole groups; a number of shards that "
                "divides k can."
            )
        pre = pre_activations(x, params["encoder"], alive_bias(params, context), context.compute_dtype)
        function = activation_functions.GroupMaxFunction(self.k // parts)
        values, indices = function.pairs(pre)
        if not prefers_dense(self.n_latents, self.k, context.shards.platform):
            return Encoded(SparseCodes(values, indices, pre.shape[1], context.shards))
        places = jnp.arange(pre.shape[1], dtype=jnp.int32)[None, :]
        kept = places == jnp.repeat(indices, pre.shape[1] // function.k, axis=1)
        return Encoded(DenseCodes(jnp.where(kept, function.kept(pre), 0), context.shards))
