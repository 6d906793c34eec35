"""How local the effects of latents are: the sparsity of what an ablation does to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mergelab.activations.losses import LOGIT_BYTES, UNEMBEDDED
from mergelab.activations.model_activations import ModelActivations, side_by_side
from mergelab.errors import SAEError
from mergelab.models.model import Model
from mergelab.models.residual_stream import logits_of, require_decoder
from mergelab.sae.activation_functions import is_active
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.sae import SAE
from mergelab.sae.splice import kept_in_pass, limits_of, token_batches
from mergelab.sae.subject_model import check_target

__all__ = ["AblationSparsity", "channel_sparsity", "effect_sparsity", "latent_sparsity"]

HORIZON = 16
"""Tokens over which effects are counted, the ablated one first: T of arXiv 2406.04093, section 4.5."""


@dataclass(frozen=True)
class AblationSparsity:
    """The effects of single ablations.

    Attributes:
        sparsity: mean of `(L1 / L2)^2 / (V T)` over ablations: the effective fraction of the V T logits that
            one moves, from `1 / (V T)` to 1; lower is more local.
        error: standard error of the mean.
        ablations: how many had any effect.
    """

    sparsity: float
    error: float
    ablations: int


def effect_sparsity(differences: Array) -> Array:
    """`(L1 / L2)^2 / (V T)` of logit differences, each token's median subtracted.

    Args:
        differences: `[..., T, V]`, before the softmax.

    Returns:
        `[...]`, NaN where nothing moved.
    """
    off = differences - jnp.median(differences, axis=-1, keepdims=True)
    l1, square = jnp.abs(off).sum(axis=(-2, -1)), jnp.square(off).sum(axis=(-2, -1))
    share = l1 * l1 / (square * (off.shape[-1] * off.shape[-2]))
    return jnp.where(square > 0, share, jnp.nan)


def latent_sparsity(
    sae: SAE,
    source: ModelActivations,
    *,
    samples: int = 256,
    horizon: int = HORIZON,
    seed: int = 0,
) -> AblationSparsity:
    """Ablates latents one at a time, each at one token, the error of the reconstruction kept.

    Args:
        sae: SAE that reads the first of the source's sites; effects begin at the one it writes.
        source: model and text.
        samples: random tokens among those that count, at each of which one of the active latents is ablated;
            a token counts as often as it has active latents, so the mean is that over all pairs of token and
            active latent.
        horizon: tokens over which effects are counted.
        seed: seed of the choice.

    Raises:
        SAEError: the SAE does not fit the site, contexts are shorter than the horizon, or nothing is
            active.
    """
    sites = (source.sites[0], check_target(sae, source))
    return _sparsity(source, sites, _latent_change, sae, samples, horizon, seed)


def channel_sparsity(
    source: ModelActivations, *, samples: int = 256, horizon: int = HORIZON, seed: int = 0
) -> AblationSparsity:
    """Sets channels of the source's first site to zero, each at one token: what latents compare with.

    At a residual site these are residual channels; at `blocks.{i}.mlp.post` they are neurons.

    Args:
        source: model and text.
        samples: random pairs of token and channel.
        horizon: tokens over which effects are counted.
        seed: seed of the choice.

    Raises:
        SAEError: contexts are shorter than the horizon, or the model predicts no tokens.
    """
    sites = (source.sites[0], source.sites[0])
    return _sparsity(source, sites, _channel_change, None, samples, horizon, seed)


_Change = Callable[[Any, Array, Array], tuple[Array, Array]]
"""SAE, activations `[batch, d]`, lots `[batch]` in [0, 1) -> what to add to each, and its weight."""


def _latent_change(sae: SAE, x: Array, lot: Array) -> tuple[Array, Array]:
    codes = sae.encode(x)
    active = is_active(codes)
    count = active.sum(axis=1, dtype=jnp.int32)
    # The lot picks one of the active latents, each as likely as the others.
    place = jnp.floor(lot * count.astype(lot.dtype)).astype(jnp.int32)
    chosen = active & (jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1 == place[:, None])
    without = jnp.where(chosen, 0, codes)
    return sae.reconstruct(x, without) - sae.reconstruct(x, codes), count


def _channel_change(_: None, x: Array, lot: Array) -> tuple[Array, Array]:
    channel = jnp.floor(lot * x.shape[1]).astype(jnp.int32)
    chosen = jnp.arange(x.shape[1], dtype=jnp.int32)[None] == channel[:, None]
    return jnp.where(chosen, -x, 0), jnp.ones(len(x), jnp.int32)


@partial(jax.jit, static_argnames=("model", "sites", "deciding", "change", "horizon"))
def _ablate(
    params: Any,
    sae: SAE | None,
    limits: Array,
    tokens: Array,
    position: Array,
    lot: Array,
    *,
    model: Model,
    sites: tuple[str, str],
    deciding: tuple[str, ...],
    change: _Change,
    horizon: int,
) -> tuple[Array, Array]:
    read, site = sites
    rows = jnp.arange(len(tokens))
    plain = model.apply(
        params, tokens, capture=list(dict.fromkeys((UNEMBEDDED, read, *deciding))), logits=False
    ).captured
    x = side_by_side(plain[read])
    difference, weight = change(sae, x[rows, position].astype(jnp.float32), lot)

    def changed(value: Array) -> Array:
        return value.at[rows, position].add(difference.reshape(-1, *value.shape[2:]).astype(value.dtype))

    edited = model.apply(params, tokens, edit={site: changed}, capture=[UNEMBEDDED], logits=False).captured
    kept = kept_in_pass(plain, deciding, limits, jnp.ones(tokens.shape, bool))[rows, position]
    weight = jnp.where(kept, weight, 0)
    seen = jax.vmap(lambda one, at: lax.dynamic_slice_in_dim(one, at, horizon))
    hidden = jnp.stack([seen(found[UNEMBEDDED], position) for found in (plain, edited)], axis=1)

    def share(two: Array) -> Array:
        before, after = logits_of(model, params, two)
        return effect_sparsity(after - before)

    # Logits, and what their medians sort, of a few ablations at a time.
    piece = max(1, LOGIT_BYTES // (4 * 2 * horizon * model.config.vocab_size))
    return lax.map(share, hidden, batch_size=min(piece, len(tokens))), weight


def _sparsity(
    source: ModelActivations,
    sites: tuple[str, str],
    change: _Change,
    sae: SAE | None,
    samples: int,
    horizon: int,
    seed: int,
) -> AblationSparsity:
    require_decoder(source.model)
    length = source.tokens.shape[1]
    if length < horizon:
        raise SAEError(
            f"contexts have {length} tokens, fewer than the horizon of {horizon}; make them longer."
        )
    rng = np.random.default_rng(seed)
    # Tokens that are too long get no weight: that is known when they are run.
    there = np.flatnonzero(source.by_place[:, : length - horizon + 1])
    if not len(there):
        raise SAEError(
            f"no token that counts has {horizon} tokens from it on in its context; make contexts longer."
        )
    chosen, positions = np.divmod(rng.choice(there, samples), length - horizon + 1)
    lots, limits = rng.random(samples), limits_of(source)

    found, weights = [], []
    for start, (tokens, real) in zip(
        range(0, samples, source.batch), token_batches(source.tokens[chosen], source.batch), strict=True
    ):
        position, lot = (
            np.pad(part[start : start + source.batch], (0, source.batch - real)) for part in (positions, lots)
        )
        share, weight = _ablate(
            source.params,
            sae,
            limits,
            tokens,
            jnp.asarray(position, jnp.int32),
            jnp.asarray(lot, jnp.float32),
            model=source.model,
            sites=sites,
            deciding=source.sites,
            change=change,
            horizon=horizon,
        )
        found.append(np.asarray(share, np.float64)[:real])
        weights.append(np.asarray(weight, np.float64)[:real])
    return _mean(np.concatenate(found), np.concatenate(weights))


def _mean(shares: np.ndarray, weights: np.ndarray) -> AblationSparsity:
    moved = np.isfinite(shares) & (weights > 0)
    shares, weights = shares[moved], weights[moved]
    if not len(shares):
        raise SAEError("no ablation moved a logit: nothing is active in the text, or the site leads nowhere.")
    mean = float((weights * shares).sum() / weights.sum())
    error = float(np.sqrt((weights**2 * (shares - mean) ** 2).sum()) / weights.sum())
    return AblationSparsity(mean, error, len(shares))


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    source, samples, seed = evidence.judge, options.samples, options.seed
    against = "effective fraction of V x T logits that an ablation moves; lower is more local"
    latents = latent_sparsity(sae, source, samples=samples, seed=seed)
    yield "latents", latents.sparsity, against
    written = check_target(sae, source)
    channels = channel_sparsity(replace(source, sites=(written,)), samples=samples, seed=seed)
    yield "channels", channels.sparsity, f"the same of channels of {written}"
    neurons = ".".join([*written.split(".")[:2], "mlp.post"])
    if len(source.model.sites().get(neurons, ())) == 3:
        found = channel_sparsity(replace(source, sites=(neurons,)), samples=samples, seed=seed)
        yield "neurons", found.sparsity, f"the same of channels of {neurons}"


METRIC = Metric(
    name="sparsity",
    about="locality of what ablating a latent does to the logits",
    units={"latents": "", "channels": "", "neurons": ""},
    measure=_scores,
    needs=("logits",),
)
