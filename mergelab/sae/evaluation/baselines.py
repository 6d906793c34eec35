"""What a dictionary must beat: one that is random, and one whose encoder alone was trained.

Reconstruction misleads: with enough latents a random decoder already explains much of the variance, and
recovers no feature. Every comparison should have both baselines in it.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.sae.initialize import initialize
from mergelab.sae.recipe import Recipe
from mergelab.sae.state import TrainState
from mergelab.sae.step import Metrics, Step
from mergelab.sae.variants.variant import Variant

__all__ = ["freeze_decoder", "random_state"]


def random_state(
    variant: Variant,
    key: Array,
    sample: np.ndarray | Array,
    target_sample: np.ndarray | Array | None = None,
) -> TrainState:
    """A dictionary before any training: decoder rows uniform on the sphere, the encoder their transpose.

    Args:
        variant: the dictionary's hyper-parameters.
        key: a `jax.random` key.
        sample: `[rows, d_in]` activations; the centre is their geometric median, as in a training.
        target_sample: `[rows, d_out]`, for a transcoder.
    """
    return initialize(variant, Recipe(steps=1, batch_size=1, ema=0), key, sample, target_sample)


def freeze_decoder(step: Step, initial: TrainState, ema: float) -> Step:
    """A step that trains everything but the directions of the decoder, and their moving average.

    Args:
        step: what `mergelab.sae.step.make_step` gave.
        initial: the state the training starts from; its decoder is copied here, before a step uses it up.
        ema: the decay of the recipe's moving average.
    """
    decoder = jnp.copy(initial.params["decoder"])

    def frozen(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, x, y)
        average = state.average
        if average:
            # The weights of an average that is not yet normalised sum to 1 - ema^steps.
            weight = 1 - ema ** state.step.astype(jnp.float32)
            average = {**average, "decoder": weight * decoder}
        # A copy: the next step donates its state, and this decoder must outlive it.
        params = {**state.params, "decoder": jnp.copy(decoder)}
        return replace(state, params=params, average=average), metrics

    return frozen
