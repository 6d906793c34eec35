"""Preferences: rewards that two models imply, and the losses of pairs, of Bradley, Terry and Elo."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mergelab.activations.losses import target_scores
from mergelab.errors import TuningError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "elo_expected",
    "elo_loss",
    "elo_update",
    "implicit_reward",
    "model_implicit_reward",
    "sequence_log_probs",
]

_SPREAD = 400 / np.log(10)
"""Elo points of one natural unit of log-odds."""


def implicit_reward(
    log_probs: ArrayLike, reference_log_probs: ArrayLike, *, beta: float = 0.1
) -> Float[Array, "*batch"]:
    """`beta * (log p(y | x) - log p_ref(y | x))`: the reward that a policy is optimal for, up to a term of x.

    Rafailov et al. 2023 (arXiv:2305.18290), equation 5; differences of answers to one prompt have a meaning.

    Args:
        log_probs: log-probability of whole answers, in nats.
        reference_log_probs: the same under the model that the policy came from.
        beta: strength of the KL penalty that the reward belongs to.
    """
    return jnp.float32(beta) * (_floats(log_probs) - _floats(reference_log_probs))


def dpo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "*pairs"]:
    """`-log sigmoid(r(chosen) - r(rejected))` with the implicit reward `r`, for each pair, in nats.

    Args:
        chosen: log-probability of the answer that was preferred, under the policy.
        rejected: the same of the other.
        reference_chosen: log-probability of the one that was preferred, under the reference.
        reference_rejected: the same of the other.
        beta: same as in `implicit_reward`.
        label_smoothing: probability that a label is wrong, from 0 to below one half: that part of the loss
            prefers the other answer.

    Raises:
        TuningError: the smoothing is not within these.
    """
    if not 0 <= label_smoothing < 0.5:
        raise TuningError(f"label_smoothing is {label_smoothing!r}, but needs a number from 0 to below 0.5.")
    margin = implicit_reward(chosen, reference_chosen, beta=beta) - implicit_reward(
        rejected, reference_rejected, beta=beta
    )
    loss = (1 - label_smoothing) * jax.nn.softplus(-margin)
    return loss + label_smoothing * jax.nn.softplus(margin)


def bradley_terry_loss(
    preferred: ArrayLike, other: ArrayLike, *, margin: ArrayLike = 0.0
) -> Float[Array, "*pairs"]:
    """`-log sigmoid(preferred - other - margin)`: what scores of a reward model are trained by, in nats.

    Args:
        preferred: score of what was preferred.
        other: score of the other.
        margin: lead that the one should have (Llama 2, arXiv:2307.09288); 0 for plain preferences.
    """
    lead = _floats(preferred) - _floats(other)
    return jax.nn.softplus(jnp.broadcast_to(_floats(margin), lead.shape) - lead)


def elo_expected(first: ArrayLike, second: ArrayLike) -> Float[Array, "*games"]:
    """`1 / (1 + 10^((second - first) / 400))`: the score that the first is expected to make, from 0 to 1."""
    return jax.nn.sigmoid((_floats(first) - _floats(second)) / jnp.float32(_SPREAD))


def elo_loss(first: ArrayLike, second: ArrayLike, score: ArrayLike) -> Float[Array, "*games"]:
    """Cross-entropy of games under ratings, in nats: Bradley and Terry's model in Elo's points.

    Args:
        first: rating of the first player of each game.
        second: rating of the second.
        score: what the first made: 1 for a win, 0.5 for a draw, 0 for a loss.
    """
    odds = (_floats(first) - _floats(second)) / jnp.float32(_SPREAD)
    made = _floats(score)
    return made * jax.nn.softplus(-odds) + (1 - made) * jax.nn.softplus(odds)


def elo_update(
    first: ArrayLike, second: ArrayLike, score: ArrayLike, *, k: float = 32.0
) -> tuple[Float[Array, "*games"], Float[Array, "*games"]]:
    """Both ratings after a game: `k` times what the first made beyond what was expected goes over to it.

    That is a step of gradient descent on `elo_loss`, of size `400 k / ln 10`.
    """
    moved = jnp.float32(k) * (_floats(score) - elo_expected(first, second))
    return _floats(first) + moved, _floats(second) - moved


@partial(jax.jit, static_argnames="model")
def sequence_log_probs(
    model: Model, params: Params, tokens: ArrayLike, counted: ArrayLike
) -> Float[Array, " rows"]:
    """Log-probability of the counted tokens of each row, given all before them; differentiable, in nats.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: int `[rows, length]`, padded on the right.
        counted: True for the tokens of the answer, bool `[rows, length]`; the first token never counts.
    """
    ids = jnp.asarray(tokens, jnp.int32)
    logits = model.apply(params, ids[:, :-1]).logits
    assert logits is not None
    found = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(found, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(jnp.asarray(counted, jnp.bool_)[:, 1:], chosen, 0.0).sum(axis=1)


def model_implicit_reward(
    model: Model,
    params: Params,
    reference: tuple[Model, Params],
    tokens: Any,
    counted: Any,
    *,
    beta: float = 0.1,
    batch: int = 8,
) -> np.ndarray:
    """`implicit_reward` of answers by two models, for scoring: rows in batches, 256 MB of logits at a time.

    Args:
        model: a decoder, such as a fine-tune.
        params: its parameters, on any mesh.
        reference: the model it came from, with its parameters.
        tokens: int `[rows, length]`, padded on the right.
        counted: True for the tokens of the answer, bool `[rows, length]`; the first token never counts.
        beta: same as in `implicit_reward`.
        batch: rows in one pass.

    Returns:
        float32 `[rows]`.

    Raises:
        SiteError: a model predicts no next tokens.
        TuningError: the vocabularies differ in size, or the shapes do.
        TokenError: ids beyond the vocabulary, or rows longer than learned positions.
    """
    ids, there = np.asarray(tokens, np.int32), np.asarray(counted, bool)
    sizes = [one.config.vocab_size for one in (model, reference[0])]
    if sizes[0] != sizes[1]:
        raise TuningError(
            f"the model has a vocabulary of {sizes[0]:,} tokens and the reference one of {sizes[1]:,}; their "
            "log-probabilities are of different tokens, so give models with one tokenizer."
        )
    if ids.ndim != 2 or ids.shape != there.shape or ids.shape[1] < 2:
        raise TuningError(
            f"tokens of shape {list(ids.shape)} and counted of shape {list(there.shape)} are no answers; "
            "expected [rows, length] for both, of 2 tokens or more."
        )
    found = []
    for one, weights in ((model, params), reference):
        require_decoder(one)
        nats, _ = target_scores(one, weights, ids, there[:, 1:], batch=batch)
        found.append(-nats.astype(np.float64).sum(axis=1))
    return (beta * (found[0] - found[1])).astype(np.float32)


def _floats(values: ArrayLike) -> Array:
    return jnp.asarray(values).astype(jnp.float32)
