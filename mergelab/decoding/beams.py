"""Beam search: the likeliest whole continuations, several of which are followed side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mergelab.compat import register_dataclass
from mergelab.decoding.generation import begin_samples
from mergelab.decoding.generation_state import NO_CACHE, GenerationState, step_places
from mergelab.decoding.passes import Reader, check_one_rotation
from mergelab.decoding.spread import on_host
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transforms import Chain, History, LogitsTransform, chain, require
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials

__all__ = ["Beams", "beam_search"]

_NEVER = -1e9  # a log-probability that no text has


@dataclass(frozen=True)
class Beams:
    """What beam search found for each prompt, the best first.

    Attributes:
        tokens: int32 `[batch, beams, max_new_tokens]`, without the prompt; `pad_id` after a text's end.
        lengths: int32 `[batch, beams]`, tokens of each, what ended it among them.
        scores: float32 `[batch, beams]`, log-probability over `length ** length_penalty`.
        log_probs: float32 `[batch, beams]`, log-probability of each, after transforms, in nats.
        finished: bool `[batch, beams]`, whether the stop rule ended it.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    log_probs: np.ndarray
    finished: np.ndarray

    def rows(self, prompt: int = 0) -> list[list[int]]:
        """The continuations of one prompt, the best first; fewer than `beams` where there are no more."""
        triples = zip(self.tokens[prompt], self.lengths[prompt], self.scores[prompt], strict=True)
        return [row[:length].tolist() for row, length, score in triples if score > _NEVER / 2]


@register_dataclass
@dataclass(frozen=True)
class _Best:
    """The best finished continuations of each prompt, `[batch, beams, ...]`; scores of `_NEVER` are none."""

    tokens: Array
    lengths: Array
    scores: Array
    log_probs: Array
    ended: Array
    open: Bool[Array, " batch"]  # whether a better one may still come


def beam_search(
    model: Model,
    params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    transforms: LogitsTransform | None = None,
    stop: Stop | None = None,
    edit: Mapping[str, Edit] | None = None,
    pad_id: int = 0,
) -> Beams:
    """Follows the `beams` likeliest beginnings of each prompt, and gives the best `beams` continuations.

    A step extends every beginning by every token and keeps the likeliest. One that ends is scored by
    `log p / length ** length_penalty`; the search is over when no beginning can come to a better score at its
    present length, as in `transformers` (whose results these are), or all have reached `max_new_tokens`.

    Args:
        model: a decoder.
        params: its parameters, on one device or sharded.
        tokens: int `[batch, length]`, padded on the left (`pad_prompts`).
        mask: bool `[batch, length]`, True for real tokens; None if there is no padding.
        max_new_tokens: largest number of tokens of a continuation.
        beams: number of beginnings that are followed, at least 1; 1 is greedy search.
        length_penalty: power of the length that a log-probability is divided by; 0 for no such penalty.
        early_stopping: whether the search ends with the `beams`-th finished continuation of every prompt.
        transforms: applied to the log-probabilities of each step.
        stop: rule that ends a continuation; never by default.
        edit: same as in `generate`.
        pad_id: token that fills `Beams.tokens` after an end.

    Raises:
        DecodingError: as `generate`; for fewer than one beam.
    """
    require("beam_search(beams)", beams, beams >= 1, "at least 1")
    finite = isinstance(length_penalty, int | float) and abs(length_penalty) < float("inf")
    require("beam_search(length_penalty)", length_penalty, finite, "a finite number")
    stop, steps = stop or stop_at(), chain() if transforms is None else chain(transforms)
    require("beam_search(stop)", "a monitor", stop.monitor is None, "a rule without one")
    prompts = np.asarray(tokens)
    check_one_rotation(model, prompts, mask, max_new_tokens)
    progress, _, spread = begin_samples(
        model,
        params,
        prompts,
        mask,
        samples=beams,
        max_new_tokens=max_new_tokens,
        stop=stop,
        edit=edit,
        pad_id=pad_id,
    )
    rows = progress.last.shape[0]
    batch = rows // beams if spread is None else len(prompts)
    if spread is not None:  # rows are exchanged between beams: padding would be exchanged with them
        progress = jax.tree.map(lambda x: x[: batch * beams] if x.ndim else x, progress)
    progress = replace(progress, finished=jnp.zeros(batch * beams, jnp.bool_))
    reader = Reader(model, params, edit=edit)
    edits, cache, rest = as_partials(edit), progress.cache, replace(progress, cache=NO_CACHE)
    running = np.full((batch, beams), _NEVER, np.float32)
    running[:, 0] = 0.0  # all beams of a prompt are still the same
    scores: Array = jnp.asarray(running)
    best = _none(rest.tokens, jnp.int32(pad_id), batch=batch, beams=beams)
    for step in range(max_new_tokens):
        places = step_places(replace(rest, cache=cache)) if edits else None
        out = reader(rest.last[:, None], cache, places)
        assert out.logits is not None and out.cache is not None
        rest, scores, best, parents, running_on = _extended(
            rest,
            scores,
            best,
            out.logits[:, -1],
            steps,
            stop,
            jnp.bool_(step + 1 == max_new_tokens),
            jnp.float32(length_penalty),
            jnp.int32(pad_id),
            beams=beams,
            early=early_stopping,
        )
        if not bool(on_host(running_on)):
            break
        cache = _taken(out.cache, parents)
    return Beams(
        on_host(best.tokens)[..., :max_new_tokens],
        on_host(best.lengths),
        on_host(best.scores),
        on_host(best.log_probs),
        on_host(best.ended),
    )


@partial(jax.jit, donate_argnames="cache")
def _taken(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    return jax.tree.map(lambda x: x[rows], cache)


@partial(jax.jit, static_argnames=("batch", "beams"))
def _none(tokens: Array, pad_id: Array, *, batch: int, beams: int) -> _Best:
    shape = (batch, beams)
    return _Best(
        jnp.broadcast_to(pad_id, (*shape, tokens.shape[1])),
        jnp.zeros(shape, jnp.int32),
        jnp.full(shape, _NEVER, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.bool_),
        jnp.ones(batch, jnp.bool_),
    )


@partial(jax.jit, static_argnames=("beams", "early"))
def _extended(
    p: GenerationState,
    scores: Float[Array, "batch beams"],
    best: _Best,
    logits: Float[Array, "rows vocab"],
    transforms: Chain,
    stop: Stop,
    last: Bool[Array, ""],
    length_penalty: Float[Array, ""],
    pad_id: Int[Array, ""],
    *,
    beams: int,
    early: bool,
) -> tuple[GenerationState, Array, _Best, Array, Array]:
    """All beginnings with one token more: the state, their scores, the best, each one's parent row, go on?"""
    batch, vocab = scores.shape[0], logits.shape[1]
    history = History(p.seen, p.lengths, {}, p.tokens)
    log_probs = transforms(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), history)
    total = (scores[:, :, None] + log_probs.reshape(batch, beams, vocab)).reshape(batch, -1)
    # As many as leave `beams` to go on where all of the others end.
    kept = min(max(2, 1 + np.shape(stop.ids)[0] + np.shape(stop.sequences)[0]) * beams, total.shape[1])
    top, flat = jax.lax.top_k(total, kept)
    token = (flat % vocab).astype(jnp.int32)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None] * beams + (flat // vocab).astype(jnp.int32)
    recent = stop.push(p.recent[row.reshape(-1)], token.reshape(-1))
    ended = stop(recent, token.reshape(-1)).reshape(batch, kept)
    ends = ended | last
    length = p.lengths[0] + 1
    texts = jnp.where(
        jnp.arange(p.tokens.shape[1], dtype=jnp.int32)[None, None] == p.lengths[0],
        token[:, :, None],
        p.tokens[row],
    )
    # Those that end go among the best, if they are among the first `beams` of this step.
    fits = ends & (top > _NEVER / 2) & (jnp.arange(kept, dtype=jnp.int32)[None] < beams) & best.open[:, None]
    if early:
        fits &= (best.scores <= _NEVER / 2).any(axis=1, keepdims=True)
    power = length.astype(jnp.float32) ** length_penalty
    new = jnp.where(fits, top / power, _NEVER)
    merged = jnp.concatenate([best.scores, new], axis=1)
    found, which = jax.lax.top_k(merged, beams)

    def chosen(old: Array, more: Array) -> Array:
        both = jnp.concatenate([old, more], axis=1)
        return jnp.take_along_axis(both, which.reshape(*which.shape, *[1] * (both.ndim - 2)), axis=1)

    grown = jnp.broadcast_to(length, token.shape)
    # Those that go on.
    onward, picked = jax.lax.top_k(jnp.where(ends, _NEVER, top), beams)
    possible = onward[:, :1] / power > jnp.where(found > _NEVER / 2, found.min(axis=1, keepdims=True), _NEVER)
    open_ = best.open & possible.any(axis=1)
    best = _Best(
        chosen(best.tokens, texts),
        chosen(best.lengths, grown),
        found,
        chosen(best.log_probs, top),
        chosen(best.ended, ended),
        open_,
    )
    parents = jnp.take_along_axis(row, picked, axis=1).reshape(-1)
    next_token = jnp.take_along_axis(token, picked, axis=1).reshape(-1)
    rows = jnp.arange(parents.shape[0], dtype=jnp.int32)
    p = replace(
        p,
        last=next_token,
        seen=p.seen[parents].at[rows, next_token].set(True),
        recent=stop.push(p.recent[parents], next_token),
        tokens=jnp.take_along_axis(texts, picked[..., None], axis=1).reshape(p.tokens.shape),
        lengths=p.lengths + 1,
        steps=p.steps + 1,
    )
    full = (found > _NEVER / 2).all()
    going = open_.any() & ~ends.all() & ~(full & early)
    return p, onward, best, parents, going
