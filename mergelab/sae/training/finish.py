"""The SAE that a training has found, ready for raw activations, from its state.

Training sees `(x - mean) * scale`. That is folded in exactly: codes are given the unit of the raw input
(divided by the input's scale, which every activation here commutes with), so decoder rows keep their norm for
an autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.state import TrainState
from mergelab.sae.training.update import averaged_params
from mergelab.sae.variants.variant import Variant

__all__ = ["finished_sae", "transcodes"]


def finished_sae(
    variant: Variant,
    recipe: TrainingRecipe,
    state: TrainState,
    *,
    use_average: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> SAE:
    """The SAE of a training: the same codes, up to one unit, and the same reconstruction of raw
    inputs.

    Args:
        variant: the training's.
        recipe: the training's.
        state: state of the training.
        use_average: takes the moving average of the parameters, where the recipe keeps one.
        metadata: kept in the SAE's configuration; `site` and `target_site` are what it reads and
            writes.

    Raises:
        SAEError: the metadata names a target for an autoencoder.
    """
    params = averaged_params(state, recipe.ema_decay) if use_average else state.params
    said = variant.export(params, state.statistics)
    scale_in, scale_out = state.read.scale, state.target.scale
    encoder, decoder = params["encoder"], params["decoder"]
    b_dec = params["decoder_bias"] / scale_out + state.target.mean
    # p = encoder ((x - mean) * scale - bias) + encoder_bias, and the codes are p / scale.
    bias = params["encoder_bias"]
    if variant.d_out is None:
        bias = bias - encoder @ params["decoder_bias"]
    b_enc = bias / scale_in - encoder @ state.read.mean
    extras: dict[str, Array] = {}
    if "threshold" in said:
        extras["threshold"] = said["threshold"] / scale_in
    if "magnitude_scale" in said:
        # The path that measures has a bias of its own for the same product.
        extras["magnitude_scale"] = said["magnitude_scale"]
        shift = (b_enc - params["encoder_bias"] / scale_in) * jnp.exp(said["magnitude_scale"])
        extras["magnitude_bias"] = said["magnitude_bias"] / scale_in + shift
    if variant.skip:
        # skip reads the normalized input: ((x - mean) * scale_in) @ skip / scale_out.
        extras["W_skip"] = params["skip"] * (scale_in / scale_out)
        b_dec = b_dec - state.read.mean @ extras["W_skip"]
    return SAE(
        W_enc=encoder.T,
        b_enc=b_enc,
        W_dec=decoder * (scale_in / scale_out),
        b_dec=b_dec,
        config=SAEConfig(
            activation=said["activation"],
            k=said.get("k"),
            sites=variant.sites,
            normalization="layer_norm" if recipe.normalize == "layer_norm" else "none",
            transcoder=transcodes(variant, metadata or {}),
            metadata=dict(metadata or {}),
        ),
        **extras,
    ).checked()


def transcodes(variant: Variant, metadata: Mapping[str, Any]) -> bool | None:
    """Whether the variant's SAE is a transcoder; None where the two sites of the metadata say it."""
    named = variant.sites == 1 and None not in (metadata.get("site"), metadata.get("target_site"))
    return None if variant.d_out is not None and named else variant.d_out is not None
