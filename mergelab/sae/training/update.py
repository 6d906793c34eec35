"""One Adam update with the decoder on the sphere, and the schedules of its rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.rows import row_dot, update_rows
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.state import REPLICATED, TrainState
from mergelab.sae.variants.variant import SAEParams, Variant

__all__ = [
    "automatic_learning_rate",
    "averaged_params",
    "gradient_norm",
    "learning_rate",
    "unit_rows",
    "update",
]


def automatic_learning_rate(n_latents: int, steps: int) -> float:
    """Peak learning rate for an SAE of `n_latents` trained for `steps` steps.

    The paper's rule is proportional to `1 / sqrt(n_latents)`; `2e-4 / sqrt(n / 2^14)` is its usual constant.
    That constant is for trainings of many tens of thousands of steps. A short one that ends in a linear decay
    does best several times higher, so the rule is multiplied by `sqrt(200_000 / steps)`, at most 10 and at
    least 1. On toy activations with 2048 latents and 2500 steps this is 5e-3; benchmarks/README.md shows
    what it buys.
    """
    rule = 2e-4 / math.sqrt(n_latents / 2**14)
    return rule * min(max(math.sqrt(200_000 / steps), 1.0), 10.0)


def learning_rate(recipe: TrainingRecipe, peak: float | Array, step: Array) -> Array:
    """The learning rate of a step, counted from 0; the step after the last would have 0."""
    done = (step.astype(jnp.float32) + 1) / recipe.steps
    rising = jnp.minimum(done / max(recipe.warmup, 1 / recipe.steps), 1.0)
    left = 1 - step.astype(jnp.float32) / recipe.steps
    falling = jnp.minimum(left / max(recipe.decay, 1e-9), 1.0) if recipe.decay else 1.0
    return peak * jnp.minimum(rising, falling)


def unit_rows(matrix: Array) -> Array:
    """Rows scaled to norm 1: `[n, d]`."""
    return matrix * jax.lax.rsqrt(row_dot(matrix, matrix) + 1e-30)[:, None]


def without_parallel(grad: Array, rows: Array) -> Array:
    """The gradient without its component along each unit row: `[n, d]`, `[n, d]`."""
    return grad - (grad * rows).sum(axis=1)[:, None] * rows


def gradient_norm(grads: SAEParams, shards: Shards) -> Array:
    """The norm of all gradients together, over all shards of latents."""

    def square(names: list[str]) -> Array:
        return sum((jnp.sum(grads[name] ** 2) for name in names), start=jnp.zeros(()))

    split = [name for name in grads if name not in REPLICATED]
    whole = [name for name in grads if name in REPLICATED]
    return jnp.sqrt(shards.sum_latents(square(split)) + square(whole))


def update(
    variant: Variant,
    recipe: TrainingRecipe,
    state: TrainState,
    grads: SAEParams,
    shards: Shards,
    boosted: Array | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Applies gradients, summed over the batch; returns the next state and what happened.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training's.
        state: state before the step.
        grads: gradients, a pytree like its parameters.
        shards: the mesh axes.
        boosted: `[n]`, bool: latents whose bias is raised, whatever their gradients.

    `steps_since_fired` and `statistics` are left as they are: they belong to the loss.
    """
    unit = variant.unit_decoder and recipe.unit_decoder
    project = unit and recipe.project_gradients

    def allowed(name: str, grad: Array, param: Array) -> Array:
        return without_parallel(grad, param) if project and name == "decoder" else grad

    norm = gradient_norm(
        {name: allowed(name, grads[name], param) for name, param in state.params.items()}, shards
    )
    factor = None if recipe.clip is None else jnp.minimum(recipe.clip / jnp.maximum(norm, 1e-30), 1.0)
    rate = learning_rate(recipe, state.peak, state.step)
    lifting = jnp.maximum(rate, recipe.boost_floor * state.peak)
    count = state.step.astype(jnp.float32) + 1
    b2 = recipe.square_decay
    warm_mean, warm_square = 1 - recipe.b1**count, 1 - b2**count

    def advance(name: str, held: Sequence[Array], grad: Array) -> tuple[Array, ...]:
        param, mean, square, *average = held
        grad = allowed(name, grad, param)
        grad = grad if factor is None else grad * factor
        mean = recipe.b1 * mean + (1 - recipe.b1) * grad
        square = b2 * square + (1 - b2) * grad * grad
        param = param - rate * recipe.rate_of(name) * (mean / warm_mean) / (
            jnp.sqrt(square / warm_square) + recipe.eps
        )
        if unit and name == "decoder":
            param = unit_rows(param)
        if boosted is not None and name == "encoder_bias":
            param = param + jnp.where(boosted, recipe.bias_boost * lifting, 0.0)
        kept = recipe.ema_decay
        return param, mean, square, *(kept * total + (1 - kept) * param for total in average)

    moved: dict[str, tuple[Array, ...]] = {}
    for name, grad in grads.items():
        held = [group[name] for group in (state.params, state.mean, state.square, state.average) if group]
        moved[name] = update_rows(
            lambda *rows, name=name: advance(name, rows[:-1], rows[-1]), held, [grad], norm, shards
        )
    groups = ("params", "mean", "square", "average") if state.average else ("params", "mean", "square")
    stepped = {group: {name: held[i] for name, held in moved.items()} for i, group in enumerate(groups)}
    return replace(state, **stepped, step=state.step + 1), {"learning_rate": rate, "grad_norm": norm}


def averaged_params(state: TrainState, ema: float) -> SAEParams:
    """The moving average of the parameters, its weights summing to 1; the parameters where none is kept."""
    if not state.average:
        return state.params
    weight = 1 - ema ** state.step.astype(jnp.float32)
    return {
        name: jnp.where(state.step > 0, total / jnp.maximum(weight, 1e-30), state.params[name])
        for name, total in state.average.items()
    }
