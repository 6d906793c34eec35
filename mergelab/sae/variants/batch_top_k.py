"""BatchTopK: a batch of B tokens keeps its B*k largest codes (Bussmann et al., arXiv 2412.06410).

At inference there is no batch to share with: a latent is active above one threshold, the running mean of the
smallest code that training batches kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mergelab.errors import SAEError
from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import DenseCodes
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.variant import Context, Encoded, SAEParams, Variant, alive_bias

__all__ = ["BatchTopK"]

_THRESHOLD_MEMORY = 0.99


@dataclass(frozen=True)
class BatchTopK(Variant):
    """TopK over the codes of a whole batch.

    Attributes:
        k: latents per token, on average. Codes equal to the smallest one kept are kept too.
    """

    k: int = 32

    name: ClassVar[str] = "batch_topk"
    activation = activation_functions.BatchTopKFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_latents:
            raise SAEError(f"k is {self.k}; it must be from 1 to n_latents={self.n_latents}.")

    def own_statistics(self) -> dict[str, Array]:
        return {"threshold": jnp.zeros(()), "weight": jnp.zeros(())}

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        shards = context.shards
        pre = pre_activations(x, params["encoder"], alive_bias(params, context), context.compute_dtype)
        k = self.k if context.k is None else context.k
        codes, smallest = activation_functions.BatchTopKFunction.of_batch(
            pre,
            k * context.tokens,
            lambda flags: shards.sum_all(flags.sum(dtype=jnp.int32, keepdims=True)),
        )
        memory = _THRESHOLD_MEMORY
        return Encoded(
            DenseCodes(codes, shards),
            statistics={
                "threshold": memory * context.statistics["threshold"] + (1 - memory) * smallest[0, 0],
                "weight": memory * context.statistics["weight"] + (1 - memory),
            },
        )

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        threshold = statistics["threshold"] / jnp.maximum(statistics["weight"], 1e-12)
        return {
            "activation": self.activation.name,
            "k": self.k,
            "threshold": lax.broadcast(threshold, (params["encoder"].shape[0],)),
        }
