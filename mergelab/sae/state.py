"""Everything a training is, between two steps: one pytree that checkpoints, shards and vmaps as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from mergelab.sae.variants.variant import Params

__all__ = ["Affine", "TrainState"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """A normalisation of activations, `(x - mean) * scale`, the same for every token.

    Attributes:
        mean: `[d]`.
        scale: scalar.
    """

    mean: Array
    scale: Array

    def __call__(self, x: Array) -> Array:
        return (x - self.mean[None, :]) * self.scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of one training.

    Attributes:
        params: the parameters, float32.
        mean: Adam's running mean of the gradients, like `params`.
        square: Adam's running mean of their squares, like `params`.
        average: sum of the moving average of the parameters, not yet divided by the sum of its weights; empty
            where the recipe keeps none.
        quiet: `[n]`, int32: tokens since each latent last fired.
        step: int32, steps done.
        peak: float32, peak learning rate.
        mse_scale: float32, one over the variance of the targets, computed once.
        read: normalisation of the inputs.
        target: normalisation of the targets.
        statistics: running numbers of the variant.
        trial: what a sweep varies within one program: `k`, int32, and `n_latents`, int32; may be empty.
    """

    params: Params
    mean: Params
    square: Params
    average: Params
    quiet: Array
    step: Array
    peak: Array
    mse_scale: Array
    read: Affine
    target: Affine
    statistics: dict[str, Array]
    trial: dict[str, Array]
