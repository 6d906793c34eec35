"""Losses of next tokens: cross-entropy on windows of text in batches of one shape, and KL divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.activations.batches import filled_batches, map_pieces
from mergelab.activations.passes import TokenBatch, passes
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, read_logits
from mergelab.models.sites import Edit
from mergelab.models.token_checks import check_ids, check_length

__all__ = [
    "LOGIT_BYTES",
    "UNEMBEDDED",
    "kl_divergence",
    "kl_of_log_probabilities",
    "scores_of_windows",
    "summed_loss",
    "target_scores",
    "token_losses",
]

UNEMBEDDED = "unembed.input"
"""The site that the unembedding reads."""

LOGIT_BYTES = 2**28
"""Bytes of logits that are held at once, of all passes that are compared together."""


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


def token_losses(
    model: Model,
    params: Params,
    hidden: Float[Array, "passes batch length width"],
    targets: Int[Array, "batch length"],
) -> tuple[Float[Array, "passes batch length"], Float[Array, "batch length"]]:
    """Losses at every token of several passes over the same tokens, a few logits at a time.

    Logits of 32 contexts of 128 tokens take 4 GB a pass at a vocabulary of 256,000. Here 256 MB of them, of
    all passes together, are held at once, and as many log-probabilities.

    Args:
        model: a decoder.
        params: its parameters.
        hidden: what the site `unembed.input` holds in each pass.
        targets: the token that follows each.

    Returns:
        Cross-entropies, and `KL(first pass || second pass)` (zero where there is one pass), in nats, float32.
    """
    passes, batch, length, width = hidden.shape
    rows = batch * length
    piece = max(1, min(rows, LOGIT_BYTES // (4 * passes * model.config.vocab_size)))
    pieces = -(-rows // piece)

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, pieces * piece - rows), *[(0, 0)] * (x.ndim - 1)))

    def losses(given: tuple[Array, Array]) -> Array:
        normed, wanted = given
        logp = jax.nn.log_softmax(logits_of(model, params, normed.swapaxes(0, 1)), axis=-1)
        ce = -jnp.take_along_axis(logp, wanted[None, :, None], axis=-1)[..., 0]
        kl = kl_of_log_probabilities(logp[0], logp[1]) if passes > 1 else jnp.zeros(ce.shape[1:], ce.dtype)
        return jnp.concatenate([ce, kl[None]])

    flat = padded(jnp.moveaxis(hidden.reshape(passes, rows, width), 1, 0))
    wanted = padded(targets.reshape(rows))
    given = flat.reshape(pieces, piece, passes, width), wanted.reshape(pieces, piece)
    found = jnp.moveaxis(jax.lax.map(losses, given), 1, 0).reshape(passes + 1, -1)
    found = found[:, :rows].reshape(passes + 1, batch, length)
    return found[:passes], found[passes]


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
        params: its parameters, on any mesh, or streamed.
        tokens: int32 `[windows, length + 1]`; the first column is context only.
        is_target: bool `[windows, length]`, which of the others count.
        edit: functions by site, as in `Model.apply`.
        batch: windows in one forward pass.

    Raises:
        TokenError: ids beyond the vocabulary, or windows longer than the model's learned positions.
    """
    check_ids(tokens, model.config.vocab_size, "the model's vocabulary", "windows of text")
    check_length(model, tokens.shape[1] - 1)
    given = [
        TokenBatch(rows[:, :-1], edit=edit or {}, extra=(rows[:, 1:], counted))
        for (rows, counted), _ in filled_batches(batch, tokens, is_target)  # what fills up counts for nothing
    ]
    found = passes(model, params, given, "logits", keep=_summed_nats)
    return sum(float(one["logits"]) for one in found)


def _summed_nats(
    logits: Float[Array, "batch length vocab"],
    extra: tuple[Int[Array, "batch length"], Bool[Array, "batch length"]],
) -> Float[Array, ""]:
    targets, counted = extra
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, losses, 0.0))


def target_scores(
    model: Model, params: Params, tokens: np.ndarray, is_target: np.ndarray, *, batch: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of every target, and whether the most probable token is the target; 256 MB of logits at a time.

    Args:
        model: a decoder.
        params: its parameters, on any mesh, or streamed.
        tokens: int32 `[windows, length + 1]`; the first column is context only.
        is_target: bool `[windows, length]`, which of the others count; padding, on the right, does not.
        batch: windows in one forward pass.

    Returns:
        `-ln p(target | the tokens before it in its window)` in nats, float32 `[windows, length]`, 0 where
        nothing counts; and the hits, bool `[windows, length]`, False there.

    Raises:
        TokenError: ids beyond the vocabulary, or windows longer than the model's learned positions.
    """
    return scores_of_windows(model, params, [(tokens, is_target)], batch=batch)[0]


def scores_of_windows(
    model: Model, params: Params, windows: Sequence[tuple[np.ndarray, np.ndarray]], *, batch: int = 8
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`target_scores` of windows of several lengths: streamed weights are read once for all of them.

    Args:
        model: a decoder.
        params: its parameters, on any mesh, or streamed.
        windows: tokens and what counts of them, as `target_scores` takes them, of each length.
        batch: windows in one forward pass.

    Raises:
        TokenError: as `target_scores`.
    """
    parts, given = [], []
    for place, (tokens, is_target) in enumerate(windows):
        check_ids(tokens, model.config.vocab_size, "the model's vocabulary", "windows of text")
        check_length(model, tokens.shape[1] - 1)
        for (rows, counted), real in filled_batches(batch, tokens, is_target):
            parts.append((place, real))
            given.append(TokenBatch(rows[:, :-1], extra=(rows[:, 1:], counted)))
    nats: list[list[np.ndarray]] = [[] for _ in windows]
    hits: list[list[np.ndarray]] = [[] for _ in windows]
    found = passes(model, params, given, UNEMBEDDED, read=_scored_targets)
    for (place, real), (losses, right) in zip(parts, found, strict=True):
        nats[place].append(np.asarray(losses)[:real])
        hits[place].append(np.asarray(right)[:real])
    return [(np.concatenate(one), np.concatenate(other)) for one, other in zip(nats, hits, strict=True)]


def _scored_targets(
    model: Model,
    params: Params,
    kept: Mapping[str, Array],
    extra: tuple[Int[Array, "batch length"], Bool[Array, "batch length"]],
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    hidden, (targets, counted) = kept[UNEMBEDDED], extra

    def score(given: tuple[Array, Array]) -> tuple[Array, Array]:
        normed, target = given
        logits = read_logits(model, params, normed[None])[0]
        return jax.nn.logsumexp(logits) - logits[target], jnp.argmax(logits) == target

    rows = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    nats, hits = map_pieces(score, rows, max(1, LOGIT_BYTES // (4 * model.config.vocab_size)))
    return jnp.where(counted, nats.reshape(counted.shape), 0.0), counted & hits.reshape(counted.shape)
