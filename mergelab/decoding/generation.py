"""Generation with a cache: begin, advance, generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from mergelab.activations.batches import bucket_size, check_prompts, widen
from mergelab.decoding.samplers import Sampler, greedy, row_keys
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transforms import History, require
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.sites import Edit, as_partials, match_sites
from mergelab.models.token_checks import learned_positions, warn_of_long_rope

__all__ = ["Generated", "GenerationState", "advance", "begin", "generate", "start"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerationState:
    """Rows of text while they grow; a pytree of fixed shapes.

    Attributes:
        cache: keys and values of every token but the last of each row.
        last: that last token, int32 `[batch]`.
        seen: bool `[batch, vocab]`, the tokens of each row.
        recent: the tokens that may complete a stop sequence, int32 `[batch, width]`.
        tokens: what was generated, int32 `[batch, capacity]`; `pad_id` after a row's end.
        lengths: tokens generated, those that ended a row among them, int32 `[batch]`.
        finished: bool `[batch]`, whether the row has ended.
        steps: number of steps done, an int32 scalar.
        log_probs: log-probability of every generated token, float32 `[batch, capacity]`: what the model's
            logits give it, before any transform; 0 after a row's end. None where they are not kept.
        captured: sites of the pass that chose each row's last generated token, `[batch, ...]`; zeros before
            the first step. Their names are those that `advance` captures.
    """

    cache: Cache
    last: Int[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    recent: Int[Array, "batch width"]
    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    steps: Int[Array, ""]
    log_probs: Float[Array, "batch capacity"] | None = None
    captured: dict[str, Array] = field(default_factory=dict)

    def repeat(self, times: int) -> GenerationState:
        """Every row `times` times, one copy after the other: samples of one prompt that is read once."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, self)


@partial(jax.jit, static_argnames=("model", "capacity", "log_probs", "capture"))
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
    log_probs: bool = False,
    capture: tuple[str, ...] = (),
) -> GenerationState:
    """Reads the prompts, all but their last tokens, into a cache with room for `capacity` more.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: the prompts, padded on the left.
        mask: True for real tokens.
        capacity: largest number of tokens that may be generated; static.
        stop: rule that ends rows.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
        pad_id: what `GenerationState.tokens` holds after a row's end.
        log_probs: whether log-probabilities of generated tokens are kept; static.
        capture: names of sites to keep of every row's last step; static.
    """
    batch, length = tokens.shape
    vocab = model.config.vocab_size
    dtype = params["embed"]["embedding"].dtype
    if model.causal:  # `new_cache` refuses the others
        require_decoder(model)
    cache = model.new_cache(batch, length - 1 + capacity, dtype)
    if length > 1:
        out = model.apply(params, tokens[:, :-1], mask=mask[:, :-1], cache=cache, edit=edit, logits=False)
        assert out.cache is not None
        cache = out.cache
    rows = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], tokens.shape)
    ids = jnp.where(mask, tokens, vocab)  # padding falls outside, and is dropped
    return GenerationState(
        cache=cache,
        last=tokens[:, -1],
        seen=jnp.zeros((batch, vocab), jnp.bool_).at[rows, ids].set(True, mode="drop"),
        recent=stop.no_recent(batch),
        tokens=jnp.full((batch, capacity), pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, jnp.bool_),
        steps=jnp.int32(0),
        log_probs=jnp.zeros((batch, capacity), jnp.float32) if log_probs else None,
        captured=_nothing_captured(model, params, cache, edit, capture),
    )


def _nothing_captured(
    model: Model, params: Params, cache: Cache, edit: Mapping[str, Partial], capture: tuple[str, ...]
) -> dict[str, Array]:
    """Zeros in the shapes that one step captures."""
    if not capture:
        return {}

    def step() -> dict[str, Array]:
        tokens = jnp.zeros((cache.mask.shape[0], 1), jnp.int32)
        out = model.apply(params, tokens, cache=cache, edit=edit, capture=capture)
        return _last_token(model, out.captured)

    return {site: jnp.zeros(x.shape, x.dtype) for site, x in jax.eval_shape(step).items()}


def _last_token(model: Model, captured: Mapping[str, Array]) -> dict[str, Array]:
    """Captured sites of one token a row, without the axis of tokens."""

    def token_axis(site: str) -> int:
        return next(n for n, size in enumerate(model.sites()[site]) if size in ("length", "query"))

    return {site: jnp.squeeze(value, token_axis(site)) for site, value in captured.items()}


@partial(jax.jit, static_argnames=("model",))
def advance(
    model: Model,
    params: Params,
    progress: GenerationState,
    until: Int[Array, ""],
    *,
    sampler: Sampler,
    keys: Key[Array, " batch"],
    stop: Stop,
    edit: Mapping[str, Partial],
) -> GenerationState:
    """Generates until `until` steps (at most the capacity) are done in all, or every row has ended.

    Args:
        model: the decoder.
        params: its parameters.
        progress: rows as they stand.
        until: number of steps in all, an int32 scalar.
        sampler: chooses tokens.
        keys: one per row; the `n`-th token of a row is drawn with its key folded with `n`.
        stop: rule that ends rows, of the shape that `start` was given.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
    """
    rows = jnp.arange(progress.last.shape[0], dtype=jnp.int32)
    until = jnp.minimum(until, progress.tokens.shape[1])

    def unfinished(p: GenerationState) -> Array:
        return (p.steps < until) & ~p.finished.all()

    def step(p: GenerationState) -> GenerationState:
        out = model.apply(params, p.last[:, None], cache=p.cache, edit=edit, capture=tuple(p.captured))
        assert out.logits is not None and out.cache is not None
        captured = _last_token(model, out.captured)
        draws = jax.vmap(jax.random.fold_in)(keys, p.lengths.astype(jnp.uint32))
        token = sampler(out.logits[:, -1], History(p.seen, p.lengths, captured), draws)
        recent = stop.push(p.recent, token)
        grown = ~p.finished

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(grown.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        log_probs = p.log_probs
        if log_probs is not None:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, -1]), token[:, None], axis=1)
            chosen = jnp.where(grown[:, None], chosen, 0.0)
            log_probs = jax.lax.dynamic_update_slice(log_probs, chosen, (jnp.int32(0), p.steps))
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
            log_probs=log_probs,
            captured={site: kept(captured[site], old) for site, old in p.captured.items()},
        )

    return jax.lax.while_loop(unfinished, step, progress)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: int32 `[batch, max_new_tokens]`, without the prompt; `pad_id` after a row's end.
        lengths: int32 `[batch]`, tokens of each row, what ended it among them.
        finished: bool `[batch]`, whether the stop rule ended the row (and not `max_new_tokens`).
        log_probs: float32 `[batch, max_new_tokens]`, what the model's logits give each token; None unless
            asked for.
        captured: the sites asked for, `[batch, ...]`, of the pass that chose each row's last token.
    """

    tokens: Int[Array, "batch max_new_tokens"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    log_probs: Float[Array, "batch max_new_tokens"] | None = None
    captured: dict[str, Array] = field(default_factory=dict)

    def rows(self) -> list[list[int]]:
        """The tokens of each row as a list."""
        pairs = zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        return [row[:length].tolist() for row, length in pairs]


def generate(
    model: Model,
    params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    key: Key[Array, "*batch"] | int = 0,
    stop: Stop | None = None,
    edit: Mapping[str, Edit] | None = None,
    pad_id: int = 0,
    samples: int = 1,
    log_probs: bool = False,
    capture: Sequence[str] = (),
) -> Generated:
    """Continues every prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its own prompt and key only: padding is never attended to, the `n`-th token is
    drawn with `fold_in(row's key, n)`, and rows that have ended change no other. (Another width of padding
    may round logits differently.) Compiled once per batch size and per bucket of prompt length and
    `max_new_tokens` (`bucket_size`); settings of samplers and stop rules are arguments of the program.

    Args:
        model: a decoder.
        params: its parameters, on one device or sharded.
        tokens: int `[batch, length]`, padded on the left (`pad_prompts`).
        mask: bool `[batch, length]`, True for real tokens; None if there is no padding.
        max_new_tokens: largest number of tokens that are generated per row.
        sampler: choice of tokens; `greedy()` by default.
        key: a seed or a key, folded with the row's number; or one key per row of the result.
        stop: rule that ends rows; never by default.
        edit: functions by site name or glob pattern, as in `Model.apply`. They see `[batch, length, ...]`,
            first with all of the prompt but its last token (padding included), then with one token at a
            time. Give one that holds arrays as `jax.tree_util.Partial(function, *arrays)` to change them
            without compiling again; `function` comes with the arrays first.
        pad_id: token that fills `Generated.tokens` after a row's end.
        samples: number of continuations of each prompt, which is read once; the rows of one prompt follow
            one another in the result.
        log_probs: whether the log-probability of every generated token is kept.
        capture: names or glob patterns of sites to keep of each row's last step; transforms read those of the
            current step as `History.captured`.

    Raises:
        DecodingError: prompts that are empty or padded elsewhere, unknown token ids, or more tokens than
            the model has positions.
        SiteError: `capture` or an edit names no site, or an edit changes shape or dtype.
    """
    stop, sampler, edits = stop or stop_at(), sampler or greedy(), as_partials(edit)
    require("generate(samples)", samples, samples >= 1, "at least 1")
    progress = begin(
        model,
        params,
        tokens,
        mask,
        max_new_tokens=max_new_tokens,
        stop=stop,
        edit=edit,
        pad_id=pad_id,
        log_probs=log_probs,
        capture=capture,
    )
    if samples > 1:
        progress = progress.repeat(samples)
    keys = row_keys(key, progress.last.shape[0])
    limit = jnp.int32(max_new_tokens)
    done = advance(model, params, progress, limit, sampler=sampler, keys=keys, stop=stop, edit=edits)
    return Generated(
        done.tokens[:, :max_new_tokens],
        done.lengths,
        done.finished,
        None if done.log_probs is None else done.log_probs[:, :max_new_tokens],
        done.captured,
    )


def begin(
    model: Model,
    params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    stop: Stop,
    edit: Mapping[str, Edit] | None = None,
    pad_id: int = 0,
    log_probs: bool = False,
    capture: Sequence[str] = (),
) -> GenerationState:
    """Checks prompts, pads them to a bucket, and reads them: the first half of `generate`.

    Raises:
        DecodingError: as `generate`.
        SiteError: as `generate`.
    """
    prompts = np.asarray(tokens)
    integral = prompts.dtype.kind in "iu"
    require("generate(tokens)", str(prompts.dtype), integral, "token ids of an integer type")
    real = np.ones(prompts.shape, bool) if mask is None else np.asarray(mask, bool)
    check_prompts(prompts, real, model.config.vocab_size)
    require("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    longest = int(real.sum(axis=1).max()) + max_new_tokens - 1  # the last token is never read
    room = learned_positions(model)
    if room is not None:
        place = f"generate(max_new_tokens={max_new_tokens})"
        require(place, f"{longest} positions", longest <= room, f"at most the model's {room} learned ones")
    warn_of_long_rope(model, real.sum(axis=1).tolist(), max_new_tokens)
    patterns = [capture] if isinstance(capture, str) else capture
    sites = (name for pattern in patterns for name in match_sites(model.sites(), pattern))
    prompts, real = widen(prompts, real, bucket_size(prompts.shape[1]))
    capacity = bucket_size(max_new_tokens)
    return start(
        model,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(real),
        capacity=capacity,
        stop=stop,
        edit=as_partials(edit),
        pad_id=pad_id,
        log_probs=log_probs,
        capture=tuple(dict.fromkeys(sites)),
    )
