"""Gated: one path decides which latents are active, another how much (arXiv 2404.16014)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import DenseCodes
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.relu import warmed
from mergelab.sae.variants.variant import Context, Encoded, Outcome, SAEParams, Variant, alive_bias

__all__ = ["Gated"]


@dataclass(frozen=True)
class Gated(Variant):
    """`z = (g > 0) * relu(exp(magnitude_scale) p + magnitude_bias)`: `p = encoder (x - b)`, `g = p +
    encoder_bias`.

    The loss adds `l1 * sum relu(g)` and the error of reconstructing from `relu(g)` with the decoder held
    fixed, which trains the gate.

    Attributes:
        l1: the penalty's coefficient, for inputs of unit variance per coordinate. The default recovers
            toys of 5 and 6 features a token (`mergelab.sae.toy`); a quarter of it finds no feature.
        l1_warmup: fraction of the training over which it rises from 0.
    """

    l1: float = 4e-2
    l1_warmup: float = 0.05

    name: ClassVar[str] = "gated"
    activation = activation_functions.GatedFunction
    uses_aux_k: ClassVar[bool] = False

    def own_params(self) -> SAEParams:
        return {
            "magnitude_scale": jnp.zeros(self.n_latents),
            "magnitude_bias": jnp.zeros(self.n_latents),
        }

    def _gate(self, params: SAEParams, x: Array, context: Context) -> Array:
        return pre_activations(x, params["encoder"], alive_bias(params, context), context.compute_dtype)

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        gate = self._gate(params, x, context)
        function = activation_functions.GatedFunction(
            alive_bias(params, context), params["magnitude_scale"], params["magnitude_bias"]
        )
        return Encoded(DenseCodes(function.codes(gate), context.shards))

    def loss(self, params: SAEParams, x: Array, y: Array, context: Context) -> tuple[Array, Outcome]:
        loss, outcome = super().loss(params, x, y, context)
        gate = jnp.maximum(self._gate(params, self.center(params, x, context.shards), context), 0)
        fixed = {name: lax.stop_gradient(params[name]) for name in ("decoder", "decoder_bias")}
        from_gate = self.reconstruct({**params, **fixed}, DenseCodes(gate, context.shards), x, context)
        sizes = context.shards.join_latents(context.mean(gate.sum(axis=1)))
        penalty = warmed(self.l1, self.l1_warmup, context.progress) * sizes
        return loss + penalty + context.nmse(y - from_gate), outcome

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {
            "activation": self.activation.name,
            "magnitude_scale": params["magnitude_scale"],
            "magnitude_bias": params["magnitude_bias"],
        }
