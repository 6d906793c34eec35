"""A training that starts from an SAE, and one that goes on for longer than was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from mergelab.checkpoints.locations import local_path
from mergelab.errors import SAEError
from mergelab.sae.formats.detect import load_sae
from mergelab.sae.kernels.rows import row_dot
from mergelab.sae.sae import SAE
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.state import TrainState
from mergelab.sae.training.update import averaged_params
from mergelab.sae.variants.variant import SAEParams, Variant

__all__ = ["dictionary_folder", "extended_state", "started_from", "warm_state"]


def dictionary_folder(place: str) -> Path:
    """The folder or file of an SAE: of a run's folder its `final`.

    Raises:
        CheckpointError: there is none.
    """
    path = local_path(place, "sae")
    return path / "final" if (path / "final").is_dir() else path


def started_from(
    place: str,
    variant: Variant,
    recipe: TrainingRecipe,
    state: TrainState,
    notice: Callable[[str], None] = lambda message: None,
) -> TrainState:
    """The state before the first step of a training that starts from an SAE in any format that can be read.

    Args:
        place: the SAE.
        variant: the training's.
        recipe: the training's.
        state: the state it would start from otherwise, whose normalization of the data is kept.
        notice: function that is told what changes, one sentence each.

    Raises:
        SAEError: the SAE has other sizes, or another normalization.
        CheckpointError: it cannot be read.
    """
    sae = load_sae(dictionary_folder(place))
    wanted = (variant.d_in, variant.n_latents, variant.width_out)
    if (sae.d_in, sae.n_latents, sae.d_out) != wanted:
        raise SAEError(
            f"{place}: the SAE has d_in={sae.d_in}, n_latents={sae.n_latents}, d_out={sae.d_out}, but the "
            f"configuration and its data {', '.join(map(str, wanted))}; they must be equal to go on from it."
        )
    if sae.is_autoencoder != (variant.d_out is None) or (sae.W_skip is not None) != variant.skip:
        raise SAEError(
            f"{place}: the SAE and the configuration differ in being a transcoder or in its skip path."
        )
    if (sae.config.normalization == "layer_norm") != (recipe.normalize == "layer_norm"):
        raise SAEError(
            f"{place}: the SAE normalizes its input by {sae.config.normalization!r}, which train.normalize "
            f"{recipe.normalize!r} does not; set it to "
            f"{'layer_norm' if recipe.normalize != 'layer_norm' else 'scale'}."
        )
    if sae.config.activation != variant.activation.name:
        notice(
            f"{place} has the activation {sae.config.activation}, but is trained as {variant.name}, which "
            f"has {variant.activation.name}: it begins with other codes"
        )
    return warm_state(sae, variant, recipe, state)


def warm_state(sae: SAE, variant: Variant, recipe: TrainingRecipe, state: TrainState) -> TrainState:
    """A state of which the SAE that is given would be the finished one (`finish.finished_sae`, inverted).

    Where the variant keeps decoder rows at norm 1, the norms of the SAE's rows go into its encoder: the same
    function, but for codes that are chosen by size among rows of unlike norms.
    """

    def build(state: TrainState, sae: SAE) -> tuple[SAEParams, dict[str, jax.Array]]:
        scale_in, scale_out = state.read.scale, state.target.scale
        encoder, decoder = sae.W_enc.T, sae.W_dec * (scale_out / scale_in)
        b_enc, b_dec = sae.b_enc, sae.b_dec
        if sae.config.subtract_b_dec:
            b_enc = b_enc - encoder @ b_dec
        params: SAEParams = {"encoder": encoder, "decoder": decoder}
        if variant.skip:
            assert sae.W_skip is not None
            b_dec = b_dec + state.read.mean @ sae.W_skip
            params["skip"] = sae.W_skip * (scale_out / scale_in)
        params["decoder_bias"] = (b_dec - state.target.mean) * scale_out
        bias = (b_enc + encoder @ state.read.mean) * scale_in
        if variant.d_out is None:
            bias = bias + encoder @ params["decoder_bias"]
        norms = jnp.ones(variant.n_latents)
        if variant.unit_decoder and recipe.unit_decoder:
            norms = jnp.sqrt(row_dot(decoder, decoder))
            norms = jnp.where(norms > 0, norms, 1.0)
        params |= {"encoder_bias": bias * norms, "encoder": encoder * norms[:, None]}
        params["decoder"] = decoder / norms[:, None]
        statistics = dict(state.statistics)
        threshold = None if sae.threshold is None else sae.threshold * scale_in * norms
        if "log_threshold" in state.params:
            params["log_threshold"] = state.params["log_threshold"]
            if threshold is not None:
                params["log_threshold"] = jnp.log(jnp.maximum(threshold, 1e-6))
        if {"threshold", "weight"} <= set(statistics) and threshold is not None:
            statistics |= {"threshold": threshold.mean(), "weight": jnp.ones(())}
        if "magnitude_scale" in state.params:
            params |= {name: state.params[name] for name in ("magnitude_scale", "magnitude_bias")}
            if sae.magnitude_scale is not None and sae.magnitude_bias is not None:
                shift = (b_enc - bias / scale_in) * jnp.exp(sae.magnitude_scale)
                params["magnitude_scale"] = sae.magnitude_scale
                params["magnitude_bias"] = (sae.magnitude_bias - shift) * scale_in * norms
        return {name: params[name] for name in state.params}, statistics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.params, dict(state.statistics)))
    arrays = sae.as_numpy()
    held = replace(sae, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})
    params, statistics = jax.jit(build, out_shardings=shardings)(state, held)
    return replace(state, params=params, statistics=statistics)


def extended_state(state: TrainState, before: TrainingRecipe, now: TrainingRecipe) -> TrainState:
    """A state of a training whose number of steps is raised, as running means of other lengths hold it.

    The mean squares of Adam and the average of the parameters are sums that are divided by the sum of their
    weights, which follows from the decay, which follows from the number of steps. The peak of the learning
    rate stays.

    Args:
        state: the state, as `before` laid it out.
        before: the recipe so far.
        now: the recipe from here on.
    """

    def build(state: TrainState) -> TrainState:
        done = state.step.astype(jnp.float32)
        weight = 1 - now.ema_decay**done
        average = {}
        if now.ema_decay:
            average = {n: v * weight for n, v in averaged_params(state, before.ema_decay).items()}
        ratio = (1 - now.square_decay**done) / jnp.maximum(1 - before.square_decay**done, 1e-30)
        square = {name: value * ratio for name, value in state.square.items()}
        return replace(state, average=average, square=square)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    like = replace(shardings, average=shardings.params if now.ema_decay else {})
    return jax.jit(build, out_shardings=like)(state)
