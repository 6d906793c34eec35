"""The state a training starts from: unit decoder rows, their transpose as encoder, a robust centre."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.layer_norm import layer_norm
from mergelab.sae.median import geometric_median
from mergelab.sae.recipe import Recipe
from mergelab.sae.schedule import automatic_learning_rate
from mergelab.sae.state import Affine, TrainState
from mergelab.sae.update import unit_rows
from mergelab.sae.variants.variant import Params, Variant

__all__ = ["SAMPLE_ROWS", "initial_params", "initialize"]

SAMPLE_ROWS = 32_768
"""Activations from which the centre, the scale and the loss constant are taken, at most."""


def initial_params(variant: Variant, key: Array, *, tie: bool = True) -> Params:
    """Decoder rows uniform on the sphere, the encoder their transpose, biases 0.

    With `tie=False`, or where input and target differ in width, the encoder's rows are drawn for themselves.
    """
    n, d_in, d_out = variant.n_latents, variant.d_in, variant.width_out
    decoder_key, encoder_key = jax.random.split(key)
    decoder = unit_rows(jax.random.normal(decoder_key, (n, d_out)))
    tied = tie and variant.d_out is None
    encoder = decoder + 0 if tied else unit_rows(jax.random.normal(encoder_key, (n, d_in)))
    params = {
        "encoder": encoder,
        "encoder_bias": jnp.zeros(n),
        "decoder": decoder,
        "decoder_bias": jnp.zeros(d_out),
        **variant.own_params(),
    }
    return {**params, "skip": jnp.zeros((d_in, d_out))} if variant.skip else params


def initialize(
    variant: Variant,
    recipe: Recipe,
    key: Array,
    sample: np.ndarray | Array,
    target_sample: np.ndarray | Array | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        variant: the dictionary's hyper-parameters.
        recipe: the training's.
        key: a `jax.random` key; the same key gives the same parameters whatever the mesh.
        sample: `[rows, d_in]` activations, of which at most the first `SAMPLE_ROWS` are used.
        target_sample: `[rows, d_out]`, for a transcoder: the targets of the same tokens.

    Raises:
        SAEError: a sample has the wrong width, holds NaN or infinity, or does not vary.
    """
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
    params = initial_params(variant, key, tie=recipe.tie_initial)
    if recipe.center:
        params["decoder_bias"] = geometric_median(y)
    spread = y - y.mean(axis=0)[None, :]
    variance = jnp.mean(spread * spread)
    if not float(variance) > 0:
        raise SAEError(
            "the sample of activations does not vary, so there is nothing to learn; check the data."
        )
    peak = recipe.learning_rate or automatic_learning_rate(variant.n_latents, recipe.steps)
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    return TrainState(
        params=params,
        mean=zeros,
        square={name: value + 0 for name, value in zeros.items()},
        average={name: value + 0 for name, value in zeros.items()} if recipe.ema else {},
        quiet=jnp.zeros(variant.n_latents, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        peak=jnp.asarray(peak, jnp.float32),
        mse_scale=1 / variance,
        read=read,
        target=target,
        statistics=variant.own_statistics(),
        trial={},
    )


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


def _normalization(recipe: Recipe, x: Array, *, center: bool) -> Affine:
    """Unit variance per coordinate on average; an autoencoder's own bias does the centring."""
    mean = geometric_median(x) if center and recipe.center else jnp.zeros(x.shape[1])
    spread = x - x.mean(axis=0)[None, :]
    variance = jnp.mean(spread * spread)
    scale = jax.lax.rsqrt(jnp.maximum(variance, 1e-30)) if recipe.normalize == "scale" else jnp.ones(())
    return Affine(mean, jnp.asarray(scale, jnp.float32))
