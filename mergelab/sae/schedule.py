"""Learning rates: warm-up, plateau, linear decay, and a peak chosen from the dictionary and the budget."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from mergelab.sae.recipe import Recipe

__all__ = ["automatic_learning_rate", "learning_rate"]


def automatic_learning_rate(n_latents: int, steps: int) -> float:
    """Peak learning rate for a dictionary of `n_latents` trained for so many steps.

    The paper's rule is proportional to `1 / sqrt(n_latents)`; `2e-4 / sqrt(n / 2^14)` is its usual constant.
    That constant is for trainings of many tens of thousands of steps. A short one that ends in a linear decay
    does best several times higher, so the rule is multiplied by `sqrt(200_000 / steps)`, at most 10 and at
    least 1. On toy truth with 2048 latents and 2500 steps this is 5e-3; benchmarks/README.md shows
    what it buys.
    """
    rule = 2e-4 / math.sqrt(n_latents / 2**14)
    return rule * min(max(math.sqrt(200_000 / steps), 1.0), 10.0)


def learning_rate(recipe: Recipe, peak: float | Array, step: Array) -> Array:
    """The learning rate of a step, counted from 0; the step after the last would have 0."""
    done = (step.astype(jnp.float32) + 1) / recipe.steps
    rising = jnp.minimum(done / max(recipe.warmup, 1 / recipe.steps), 1.0)
    left = 1 - step.astype(jnp.float32) / recipe.steps
    falling = jnp.minimum(left / max(recipe.decay, 1e-9), 1.0) if recipe.decay else 1.0
    return peak * jnp.minimum(rising, falling)
