"""Generation that can be carried on: a state, the pass over the prompts that begins it, and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int, Key

from mergelab.decoding.samplers import Sampler
from mergelab.decoding.stop import Stop
from mergelab.decoding.transform import History
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params

__all__ = ["Progress", "advance", "start"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Rows of text while they grow; a pytree of fixed shapes.

    Attributes:
        cache: keys and values of every token but the last of each row.
        last: that last token, int32 `[batch]`.
        seen: bool `[batch, vocab]`, the tokens of each row.
        recent: the tokens that may complete a stop sequence, int32 `[batch, width]`.
        tokens: what was generated, int32 `[batch, capacity]`; `pad_id` after a row's end.
        lengths: tokens generated, those that ended a row among them, int32 `[batch]`.
        finished: bool `[batch]`, whether the row has ended.
        steps: steps done, an int32 scalar.
    """

    cache: Cache
    last: Int[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    recent: Int[Array, "batch width"]
    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    steps: Int[Array, ""]


@partial(jax.jit, static_argnames=("model", "capacity"))
def start(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    capacity: int,
    stop: Stop,
    edit: Mapping[str, Partial],
    pad_id: int = 0,
) -> Progress:
    """Reads the prompts, all but their last tokens, into a cache with room for `capacity` more.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: the prompts, padded on the left.
        mask: True for real tokens.
        capacity: how many tokens may be generated; static.
        stop: when rows end.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
        pad_id: what `Progress.tokens` holds after a row's end.
    """
    batch, length = tokens.shape
    vocab = model.config.vocab_size
    dtype = params["embed"]["embedding"].dtype
    cache = model.new_cache(batch, length - 1 + capacity, dtype)
    if length > 1:
        out = model.apply(params, tokens[:, :-1], mask=mask[:, :-1], cache=cache, edit=edit, logits=False)
        assert out.cache is not None
        cache = out.cache
    rows = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], tokens.shape)
    ids = jnp.where(mask, tokens, vocab)  # padding falls outside, and is dropped
    return Progress(
        cache=cache,
        last=tokens[:, -1],
        seen=jnp.zeros((batch, vocab), jnp.bool_).at[rows, ids].set(True, mode="drop"),
        recent=stop.no_recent(batch),
        tokens=jnp.full((batch, capacity), pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, jnp.bool_),
        steps=jnp.int32(0),
    )


@partial(jax.jit, static_argnames=("model",))
def advance(
    model: Model,
    params: Params,
    progress: Progress,
    until: Int[Array, ""],
    *,
    sampler: Sampler,
    keys: Key[Array, " batch"],
    stop: Stop,
    edit: Mapping[str, Partial],
) -> Progress:
    """Generates until `until` steps (at most the capacity) are done in all, or every row has ended.

    Args:
        model: the decoder.
        params: its parameters.
        progress: where to go on.
        until: an int32 scalar.
        sampler: chooses tokens.
        keys: one per row; the `n`-th token of a row is drawn with its key folded with `n`.
        stop: when rows end; of the shape that `start` was given.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
    """
    rows = jnp.arange(progress.last.shape[0], dtype=jnp.int32)
    until = jnp.minimum(until, progress.tokens.shape[1])

    def unfinished(p: Progress) -> Array:
        return (p.steps < until) & ~p.finished.all()

    def step(p: Progress) -> Progress:
        out = model.apply(params, p.last[:, None], cache=p.cache, edit=edit)
        assert out.logits is not None and out.cache is not None
        draws = jax.vmap(jax.random.fold_in)(keys, p.lengths.astype(jnp.uint32))
        token = sampler(out.logits[:, -1], History(p.seen, p.lengths), draws)
        recent = stop.push(p.recent, token)
        grown = ~p.finished
        written = jnp.where(grown, token, p.tokens[:, p.steps])
        return replace(
            p,
            cache=out.cache,
            last=jnp.where(grown, token, p.last),
            seen=p.seen.at[rows, token].set(True),
            recent=recent,
            tokens=jax.lax.dynamic_update_slice(p.tokens, written[:, None], (jnp.int32(0), p.steps)),
            lengths=p.lengths + grown.astype(jnp.int32),
            finished=p.finished | stop(recent, token),
            steps=p.steps + 1,
        )

    return jax.lax.while_loop(unfinished, step, progress)
