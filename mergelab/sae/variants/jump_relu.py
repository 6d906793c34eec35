"""JumpReLU: a learned threshold per latent, trained by straight-through estimators towards an L0.

Rajamanoharan et al., arXiv 2407.14435; the penalty is their appendix's, which aims at a number of active
latents instead of pushing it down for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae import activation_functions
from mergelab.sae.activation_functions import step
from mergelab.sae.kernels.codes import DenseCodes
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.relu import warmed
from mergelab.sae.variants.variant import Context, Encoded, SAEParams, Variant, alive_bias

__all__ = ["JumpReLU"]


@dataclass(frozen=True)
class JumpReLU(Variant):
    """`z = pre * (pre > threshold)`, loss `nmse + sparsity * (L0 / l0 - 1)^2`.

    Attributes:
        l0: number of latents that should be active per token.
        sparsity: the penalty's coefficient.
        sparsity_warmup: fraction of the training over which it rises from 0.
        bandwidth: width of the straight-through estimators, for inputs of unit variance per coordinate.
        initial_threshold: first threshold of every latent.
    """

    l0: float = 32.0
    sparsity: float = 1.0
    sparsity_warmup: float = 0.1
    bandwidth: float = 0.1
    initial_threshold: float = 0.1

    name: ClassVar[str] = "jump_relu"
    activation = activation_functions.JumpReLUFunction
    uses_aux_k: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.l0 <= self.n_latents:
            raise SAEError(f"l0 is {self.l0}; it must be above 0 and at most n_latents={self.n_latents}.")
        if min(self.bandwidth, self.initial_threshold) <= 0:
            raise SAEError("bandwidth and initial_threshold of a JumpReLU must be above 0.")

    def own_params(self) -> SAEParams:
        return {"log_threshold": jnp.full(self.n_latents, jnp.log(self.initial_threshold), jnp.float32)}

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        pre = pre_activations(x, params["encoder"], alive_bias(params, context), context.compute_dtype)
        function = activation_functions.JumpReLUFunction(jnp.exp(params["log_threshold"]), self.bandwidth)
        shards = context.shards
        above = step(function.kept(pre), function.threshold[None, :], self.bandwidth)
        active = context.mean(above.sum(axis=1))
        # (L0 / l0 - 1)^2 of the whole batch, so written that each device has its share of the gradient.
        l0 = shards.sum_all(active)
        slope = 2 * (l0 / self.l0 - 1) / self.l0
        value = (l0 / self.l0 - 1) ** 2 / shards.num_data_shards()
        share = shards.join_latents(slope * active)
        penalty = value + share - jax.lax.stop_gradient(share)
        penalty = warmed(self.sparsity, self.sparsity_warmup, context.progress) * penalty
        return Encoded(DenseCodes(function.codes(pre), shards), penalty)

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {"activation": self.activation.name, "threshold": jnp.exp(params["log_threshold"])}
