"""What latents do to the next token with nothing between: decoder rows through final norm and unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.model import Model
from mergelab.models.residual_stream import require_decoder
from mergelab.sae.sae import SAE
from mergelab.sae.splice import token_batches

__all__ = ["LogitEffects", "logit_effects", "writes_stream"]

_PIECE = 64  # latents in one pass: 64 rows of logits


@dataclass(frozen=True)
class LogitEffects:
    """Changes of logits for one unit of activation, the final norm's scale frozen at its mean over the text.

    Attributes:
        latents: `[m]`.
        top: `[m, count]`, tokens whose logits rise most, and by how much.
        top_values: `[m, count]`, falling.
        bottom: `[m, count]`, tokens whose logits fall most.
        bottom_values: `[m, count]`, rising.
        histogram: `[m, bins]`, tokens of the vocabulary by effect, between the `edges` `[m, bins + 1]`.
        edges: see `histogram`.
    """

    latents: np.ndarray
    top: np.ndarray
    top_values: np.ndarray
    bottom: np.ndarray
    bottom_values: np.ndarray
    histogram: np.ndarray
    edges: np.ndarray


def logit_effects(
    sae: SAE,
    source: ModelActivations,
    latents: Sequence[int] | np.ndarray,
    *,
    count: int = 10,
    bins: int = 20,
) -> LogitEffects:
    """Reads decoder rows as if they stood in the last residual stream.

    Args:
        sae: writes the residual stream, or what is added to it (`writes_stream`).
        source: the model, and the text whose mean scale is taken (its first pass).
        latents: those to look at.
        count: tokens at either end.
        bins: number of bins of a histogram.

    Raises:
        SAEError: the model predicts no tokens, or the SAE does not write its stream.
    """
    require_decoder(source.model)
    model = source.model
    width = model.config.d_model
    if not writes_stream(sae, source):
        raise SAEError(
            f"the SAE ({sae.mapping()}) writes activations {sae.d_out} wide, and the "
            f"model's stream is {width} wide or another site, so its latents have no effect of their own on "
            "logits; omit the effects."
        )
    tokens, real = next(token_batches(source.tokens, source.batch))
    there = jnp.asarray(source.by_place[:real])
    scale = _mean_scale(source.params, tokens[:real], there, model=model)
    chosen = np.asarray(latents, np.int64)
    filled = np.pad(chosen, (0, -len(chosen) % _PIECE))
    rows = np.asarray(sae.W_dec, np.float32)[filled].reshape(-1, _PIECE, width)
    found = [
        [np.asarray(part) for part in _effects(source.params, jnp.asarray(piece), scale, model, count, bins)]
        for piece in rows
    ]
    parts = [np.concatenate(column)[: len(chosen)] for column in zip(*found, strict=True)]
    return LogitEffects(chosen, *parts)


def writes_stream(sae: SAE, source: ModelActivations) -> bool:
    """Whether what an SAE writes is the residual stream, or is added to it.

    Width alone does not tell: where nobody said what it writes, an autoencoder writes the first site.
    """
    writes = sae.config.writes
    site = writes[0] if writes is not None else source.sites[0] if sae.is_autoencoder else None
    if site is None or sae.d_out != source.model.config.d_model:
        return False
    return site == "embed" or site.endswith(
        (".resid_pre", ".resid_mid", ".resid_post", "attn.out", "mixer.out", "mlp.out")
    )


@partial(jax.jit, static_argnames="model")
def _mean_scale(params: Any, tokens: Array, counted: Array, *, model: Model) -> Array:
    """The final norm's mean scale over the tokens that count by their place, or all if none does."""
    found = model.apply(params, tokens, capture=["final_norm.scale"], logits=False).captured
    scales = found["final_norm.scale"]
    weight = jnp.broadcast_to(jnp.where(counted.any(), counted, True)[..., None], scales.shape)
    return jnp.mean(scales, where=weight)


@partial(jax.jit, static_argnames=("model", "count", "bins"))
def _effects(
    params: Any, rows: Array, scale: Array, model: Model, count: int, bins: int
) -> tuple[Array, ...]:
    last = f"blocks.{model.config.n_layers - 1}.resid_post"

    def logits(stream: Array) -> Array:
        # Each row is a text of one token, whose last stream is replaced.
        edit = {
            last: lambda x: stream[:, None].astype(x.dtype),
            "final_norm.scale": lambda s: jnp.broadcast_to(scale.astype(s.dtype), s.shape),
        }
        out = model.apply(params, jnp.zeros((len(stream), 1), jnp.int32), edit=edit).logits
        assert out is not None
        return out[:, 0]

    # The norm's bias, where it has one, is not an effect of the latent.
    effects = logits(rows) - logits(jnp.zeros_like(rows))
    high, top = lax.top_k(effects, count)
    low, bottom = lax.top_k(-effects, count)
    counts, edges = jax.vmap(lambda row: jnp.histogram(row, bins))(effects)
    return top, high, bottom, -low, counts.astype(jnp.int32), edges
