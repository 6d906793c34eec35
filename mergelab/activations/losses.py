"""Losses of next tokens: cross-entropy on windows of text in batches of one shape, and KL divergence."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from mergelab.activations.batches import filled_batches
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials
from mergelab.models.token_checks import check_ids, check_length

__all__ = ["kl_divergence", "kl_of_log_probabilities", "summed_loss"]


def kl_divergence(
    logits_p: Float[Array, "*batch vocab"], logits_q: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch"]:
    """`KL(p || q) = sum_v p(v) (ln p(v) - ln q(v))` of the distributions that logits mean; nats, float32."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (logits_p, logits_q))
    return kl_of_log_probabilities(p, q)


def kl_of_log_probabilities(
    log_p: Float[Array, "*batch vocab"], log_q: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch"]:
    """`kl_divergence`, where log-probabilities are at hand already."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def summed_loss(
    model: Model,
    params: Params,
    tokens: np.ndarray,
    is_target: np.ndarray,
    *,
    edit: Mapping[str, Edit] | None = None,
    batch: int = 8,
) -> float:
    """`sum of -ln p(target | the tokens before it in its window)`, in nats.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        tokens: int32 `[windows, length + 1]`; the first column is context only.
        is_target: bool `[windows, length]`, which of the others count.
        edit: functions by site, as in `Model.apply`.
        batch: windows in one forward pass.

    Raises:
        TokenError: ids beyond the vocabulary, or windows longer than the model's learned positions.
    """
    check_ids(tokens, model.config.vocab_size, "the model's vocabulary", "windows of text")
    check_length(model, tokens.shape[1] - 1)
    edits = as_partials(edit)
    total = 0.0
    for (rows, counted), _ in filled_batches(batch, tokens, is_target):  # what fills up counts for nothing
        total += float(_summed_loss(model, params, rows, counted, edits))
    return total


@partial(jax.jit, static_argnames="model")
def _summed_loss(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length_plus_1"],
    counted: Bool[Array, "batch length"],
    edit: Mapping[str, Partial],
) -> Float[Array, ""]:
    logits = model.apply(params, tokens[:, :-1], edit=edit).logits
    assert logits is not None
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, losses, 0.0))
