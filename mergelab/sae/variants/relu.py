"""ReLU with an L1 penalty weighted by the decoder's norms (Anthropic's April 2024 update).

The decoder is not kept at unit norm: weighing each code by the norm of its row leaves nothing to gain from
small codes and large rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import DenseCodes
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.variant import Context, Encoded, SAEParams, Variant, alive_bias

__all__ = ["ReLU", "warmed"]


def warmed(coefficient: float, warmup: float, progress: Array) -> Array:
    """A penalty's coefficient, rising linearly over the first `warmup` of the training."""
    return coefficient * jnp.minimum(progress / max(warmup, 1e-9), 1.0)


@dataclass(frozen=True)
class ReLU(Variant):
    """`z = relu(encoder (x - b) + encoder_bias)`, loss `nmse + l1 * mean sum_i z_i |d_i|`.

    Attributes:
        l1: the penalty's coefficient, for inputs of unit variance per coordinate.
        l1_warmup: fraction of the training over which it rises from 0.
    """

    l1: float = 1e-2
    l1_warmup: float = 0.05

    name: ClassVar[str] = "relu"
    activation = activation_functions.ReLUFunction
    unit_decoder: ClassVar[bool] = False
    uses_aux_k: ClassVar[bool] = False

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        pre = pre_activations(x, params["encoder"], alive_bias(params, context), context.compute_dtype)
        codes = self.activation().codes(pre)
        sizes = context.mean(codes @ self.decoder_norms(params["decoder"]))
        penalty = context.shards.join_latents(warmed(self.l1, self.l1_warmup, context.progress) * sizes)
        return Encoded(DenseCodes(codes, context.shards), penalty)

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {"activation": self.activation.name}
