"""Parameters before the first step: directions, scales and the geometric median."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, SingleDeviceSharding
from scipy.special import betaincinv

from mergelab.compat import register_dataclass
from mergelab.errors import SAEError
from mergelab.sae.kernels.rows import row_dot
from mergelab.sae.normalizations import layer_norm
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.state import Affine, TrainState, state_shardings
from mergelab.sae.training.update import automatic_learning_rate, unit_rows
from mergelab.sae.variants.variant import SAEParams, Variant

__all__ = [
    "SAMPLE_ROWS",
    "SampleFacts",
    "best_initial_scale",
    "fresh_state",
    "geometric_median",
    "initial_params",
    "initialize",
    "sample_shapes",
    "state_shapes",
]


def geometric_median(x: Array, *, tolerance: float = 1e-6, max_iterations: int = 1000) -> Array:
    """The point with the least sum of distances to the rows of `x`, by Weiszfeld's iteration.

    Args:
        x: `[rows, d]`, float32.
        tolerance: stops when a step is shorter than this times the mean distance.
        max_iterations: stops there in any case.

    Returns:
        `[d]`. Unlike the mean it is not pulled by a few huge activations.
    """

    def distances(center: Array) -> Array:
        offset = x - center[None, :]
        return jnp.sqrt(row_dot(offset, offset))

    def better(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        center, _, count = state
        far = distances(center)
        # A row at the very center would have infinite weight: bounded, the iteration can leave it.
        weights = 1 / jnp.maximum(far, 1e-7 * far.mean() + 1e-30)
        new = (weights @ x) / weights.sum()
        return new, jnp.sqrt(((new - center) ** 2).sum()) / (far.mean() + 1e-30), count + 1

    def moving(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < max_iterations)

    start = (x.mean(axis=0), jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(moving, better, start)[0]


geometric_median = jax.jit(geometric_median, static_argnames=("tolerance", "max_iterations"))


SAMPLE_ROWS = 32_768
"""Activations from which the center, the scale and the loss constant are taken, at most."""


def initial_params(
    variant: Variant, key: Array, *, tie: bool = True, scale: float | None = None
) -> SAEParams:
    """Decoder rows uniform on the sphere, the encoder their transpose times a scale, biases 0.

    Args:
        variant: the SAE's hyper-parameters.
        key: a `jax.random` key.
        tie: False draws the encoder's rows for themselves, as is done where there is a target.
        scale: scale of a tied encoder; None takes `best_initial_scale` for variants that keep k latents,
            and 1 for others.
    """
    n, d_in, d_out = variant.n_latents, variant.d_in, variant.width_out
    decoder_key, encoder_key = jax.random.split(key)
    decoder = unit_rows(jax.random.normal(decoder_key, (n, d_out)))
    tied = tie and variant.d_out is None
    if tied:
        k = getattr(variant, "k", None)
        encoder = decoder * (scale or (best_initial_scale(n, d_in, k) if k else 1.0))
    else:
        encoder = unit_rows(jax.random.normal(encoder_key, (n, d_in)))
    params = {
        "encoder": encoder,
        "encoder_bias": jnp.zeros(n),
        "decoder": decoder,
        "decoder_bias": jnp.zeros(d_out),
        **variant.own_params(),
    }
    return {**params, "skip": jnp.zeros((d_in, d_out))} if variant.skip else params


def best_initial_scale(n_latents: int, d_in: int, k: int) -> float:
    """The scale of a transposed encoder with which the first reconstructions err least.

    The k rows that agree most with an activation agree with each other too, so together they overshoot it.
    With cosines c of random directions, the sum of `c row` has a part `S = sum(c^2)` along the activation
    and a squared norm of `S^2 + S - sum(c^4)`, whatever the activations are.

    Args:
        n_latents: rows.
        d_in: their width, at least 2.
        k: latents that are kept.
    """
    if d_in < 2:
        return 1.0
    tail = (np.arange(k) + 0.5) / n_latents  # where the k largest of n cosines lie, on average
    # The square of a cosine has a Beta(1/2, (d - 1)/2) distribution, and one minus it the mirrored one.
    squares = 1 - betaincinv((d_in - 1) / 2, 0.5, 2 * tail[tail < 0.5])
    along = squares.sum()
    return float(along / (along**2 + along - (squares**2).sum()))


def initialize(
    variant: Variant,
    recipe: TrainingRecipe,
    key: Array,
    sample: np.ndarray | Array,
    target_sample: np.ndarray | Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training's.
        key: a `jax.random` key; the same key gives the same parameters whatever the mesh.
        sample: `[rows, d_in]` activations, of which at most the first `SAMPLE_ROWS` are used.
        target_sample: `[rows, d_out]`, for a transcoder: the targets of the same tokens.
        mesh: axes `data` and `latents`; each device makes its own part of the state, so that no one ever
            holds all of it. In a distributed run every process makes the same call with the same sample.

    Raises:
        SAEError: a sample has the wrong width, holds NaN or infinity, or does not vary.
        MeshError: the latents do not divide by the mesh.
    """
    build = partial(fresh_state, variant, recipe)
    facts = _sample_facts(variant, recipe, sample, target_sample)
    # Plain numbers: every process of a distributed run passes its own, equal copy.
    arguments = jax.tree.map(np.asarray, (jax.random.key_data(key), facts))
    shardings = None if mesh is None else state_shardings(jax.eval_shape(build, *arguments), mesh)
    return jax.jit(build, out_shardings=shardings)(*arguments)


def state_shapes(variant: Variant, recipe: TrainingRecipe, mesh: Mesh | None = None) -> TrainState:
    """A tree of `jax.ShapeDtypeStruct` like a state, with the shardings that `initialize` gives it."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(partial(fresh_state, variant, recipe), key, sample_shapes(variant))
    if mesh is None:
        here = SingleDeviceSharding(jnp.zeros(()).device)
        places = jax.tree.map(lambda leaf: here, shapes)
    else:
        places = state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def fresh_state(variant: Variant, recipe: TrainingRecipe, key_data: Array, facts: SampleFacts) -> TrainState:
    """The state before the first step, from what the sample says: a pure function.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training's.
        key_data: data of the `jax.random` key.
        facts: facts of the sample.
    """
    key = jax.random.wrap_key_data(key_data)
    params = initial_params(variant, key, tie=recipe.tie_initial, scale=recipe.initial_scale)
    params["decoder_bias"] = facts.center

    def zeros() -> SAEParams:
        return {name: jnp.zeros_like(value) for name, value in params.items()}

    peak = recipe.learning_rate or automatic_learning_rate(variant.n_latents, recipe.steps)
    return TrainState(
        params=params,
        mean=zeros(),
        square=zeros(),
        average=zeros() if recipe.ema_decay else {},
        steps_since_fired=jnp.zeros(variant.n_latents, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        peak=jnp.asarray(peak, jnp.float32),
        mse_scale=facts.mse_scale,
        read=facts.read,
        target=facts.target,
        statistics=variant.own_statistics(),
        sweep_member={},
    )


@register_dataclass
@dataclass(frozen=True)
class SampleFacts:
    """What a training takes from a sample of its activations.

    Attributes:
        center: `[d_out]`, where `b_pre` starts.
        mse_scale: one over the variance of the normalized targets.
        read: normalization of the inputs.
        target: normalization of the targets.
    """

    center: Array
    mse_scale: Array
    read: Affine
    target: Affine


def sample_shapes(variant: Variant) -> SampleFacts:
    """The shapes of a sample's facts, for compiling without a sample."""

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    d_in, d_out = variant.d_in, variant.width_out
    return SampleFacts(array(d_out), array(), Affine(array(d_in), array()), Affine(array(d_out), array()))


def _sample_facts(variant: Variant, recipe: TrainingRecipe, sample: Any, target_sample: Any) -> SampleFacts:
    x = _checked("sample", sample, variant.d_in)
    if recipe.normalize == "layer_norm":
        if variant.d_out is not None:
            raise SAEError("layer_norm cannot be undone for a transcoder's targets; use normalize='scale'.")
        x = layer_norm(x)[0]
    if variant.d_out is None:
        y = x
    elif target_sample is None:
        raise SAEError("a transcoder starts from a sample of its targets too: give target_sample.")
    else:
        y = _checked("target_sample", target_sample, variant.width_out)
    read = _normalization(recipe, x, center=variant.d_out is not None)
    target = _normalization(recipe, y, center=False)
    y = target(y)
    spread = y - y.mean(axis=0)[None, :]
    variance = jnp.mean(spread * spread)
    if not float(variance) > 0:
        raise SAEError(
            "the sample of activations does not vary, so there is nothing to learn; check the data."
        )
    center = geometric_median(y) if recipe.center else jnp.zeros(variant.width_out)
    return SampleFacts(center, 1 / variance, read, target)


def _checked(name: str, sample: Any, width: int) -> Array:
    if sample.ndim != 2 or sample.shape[1] != width or not len(sample):
        raise SAEError(
            f"{name} has shape {list(sample.shape)}; expected [rows, {width}] with at least one row."
        )
    rows = jnp.asarray(sample[:SAMPLE_ROWS], jnp.float32)
    if not bool(jnp.isfinite(rows).all()):
        raise SAEError(
            f"{name} holds NaN or infinity; remove those activations or find where they come from."
        )
    return rows


def _normalization(recipe: TrainingRecipe, x: Array, *, center: bool) -> Affine:
    """Unit variance per coordinate on average; an autoencoder's own bias does the centring."""
    mean = geometric_median(x) if center and recipe.center else jnp.zeros(x.shape[1])
    spread = x - x.mean(axis=0)[None, :]
    variance = jnp.mean(spread * spread)
    scale = jax.lax.rsqrt(jnp.maximum(variance, 1e-30)) if recipe.normalize == "scale" else jnp.ones(())
    return Affine(mean, jnp.asarray(scale, jnp.float32))
