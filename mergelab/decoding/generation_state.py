"""Rows of text while they grow: the state of a generation, and how prompts are read into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mergelab.compat import register_dataclass
from mergelab.decoding.spread import constrained, on_host
from mergelab.decoding.stop import NO_TOKEN, Stop
from mergelab.models.blockwise import Blockwise, runs_by_block
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.sites import TokenPlaces

__all__ = [
    "NOTHING",
    "NO_CACHE",
    "GenerationState",
    "last_token",
    "on_device",
    "read_again",
    "read_on",
    "start",
    "step_places",
    "token_axes",
    "unread",
]


@register_dataclass
@dataclass(frozen=True)
class GenerationState:
    """Rows of text while they grow; a pytree of fixed shapes.

    A row's tokens stand at its own length in `tokens` and `log_probs`, and in its own slots of the cache, so
    that rows may be taken back to any of their tokens, each by itself (`rewind`).

    Attributes:
        cache: keys and values of every token but the last of each row.
        last: that last token, int32 `[batch]`.
        seen: bool `[batch, vocab]`, the tokens of each row.
        recent: the tokens that may complete a stop sequence, int32 `[batch, width]`.
        tokens: what was generated, int32 `[batch, capacity]`; `pad_id` after a row's end.
        lengths: tokens generated, those that ended a row among them, int32 `[batch]`.
        finished: bool `[batch]`, whether the row has ended.
        steps: number of steps done, an int32 scalar; it ends a loop, and nothing that is drawn depends on it.
        prompt: the prompts as they were read, int32 `[batch, length]`.
        width: number of columns of the prompts as they were given, before padding; an int32 scalar.
        log_probs: log-probability of every generated token, float32 `[batch, capacity]`: what the model's
            logits give it, before any transform; 0 after a row's end. None where they are not kept.
        captured: sites of the pass that chose each row's last generated token, `[batch, ...]`; zeros before
            the first step. Their names are those that `advance` captures.
        readings: what the monitor of the stop rule read in the pass that chose each generated token, float32
            `[batch, capacity, readings]`; None without one.
    """

    cache: Cache
    last: Int[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    recent: Int[Array, "batch width"]
    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    steps: Int[Array, ""]
    prompt: Int[Array, "batch length"]
    width: Int[Array, ""]
    log_probs: Float[Array, "batch capacity"] | None = None
    captured: dict[str, Array] = field(default_factory=dict)
    readings: Float[Array, "batch capacity readings"] | None = None

    def repeat(self, times: int) -> GenerationState:
        """Every row `times` times, one copy after the other: samples of one prompt that is read once."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, self)

    def take(self, rows: ArrayLike) -> GenerationState:
        """Copies of some rows, in this order; a row that is named twice goes on in two ways.

        Args:
            rows: numbers of rows, int `[any]`. As many as there are compile nothing anew.
        """
        return _taken(self, on_device(np.asarray(rows, np.int32)))

    def rewind(self, lengths: ArrayLike) -> GenerationState:
        """The rows before their generated tokens beyond the first `lengths` were there.

        What is read and drawn after that is what a row would have read and drawn that never went further.
        Sites stay those of the last pass.

        Args:
            lengths: numbers of generated tokens to keep, int `[batch]`; a row with fewer stays as it is, also
                if it has ended.
        """
        return _rewound(self, on_device(np.asarray(lengths, np.int32)))


@jax.jit
def _taken(p: GenerationState, rows: Int[Array, " rows"]) -> GenerationState:
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, p)


@jax.jit
def _rewound(p: GenerationState, lengths: Int[Array, " batch"]) -> GenerationState:
    batch, capacity = p.tokens.shape
    rows, columns = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(capacity, dtype=jnp.int32)[None]
    vocab, length = p.seen.shape[1], p.prompt.shape[1]
    cut, kept = lengths < p.lengths, jnp.minimum(lengths, p.lengths)
    real = jnp.concatenate([p.cache.mask[:, : length - 1], jnp.ones((batch, 1), jnp.bool_)], axis=1)
    ids = jnp.concatenate(
        [jnp.where(real, p.prompt, vocab), jnp.where(columns < kept[:, None], p.tokens, vocab)], axis=1
    )
    width = p.recent.shape[1]
    latest = kept[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    taken = jnp.take_along_axis(p.tokens, jnp.maximum(latest, 0), axis=1)
    last = jnp.take_along_axis(p.tokens, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    # One row alone stays even: it goes on in the programs that it came by.
    slots = length - 1 + kept
    return replace(
        p,
        cache=p.cache.rewind(slots[0] if batch == 1 else slots),
        last=jnp.where(kept > 0, last, p.prompt[:, -1]),
        seen=jnp.zeros(p.seen.shape, jnp.bool_).at[rows, ids].set(True, mode="drop"),
        recent=jnp.where(latest >= 0, taken, NO_TOKEN),
        lengths=kept,
        finished=p.finished & ~cut,
        steps=jnp.max(kept),
    )


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
    width: int | None = None,
    sharding: NamedSharding | None = None,
) -> GenerationState:
    """Reads the prompts, all but their last tokens, into a cache with room for `capacity` more.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: the prompts, padded on the left.
        mask: True for real tokens.
        capacity: largest number of tokens that may be generated.
        stop: rule that ends rows.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
        pad_id: what `GenerationState.tokens` holds after a row's end.
        log_probs: whether log-probabilities of generated tokens are kept.
        capture: names of sites to keep of every row's last step.
        width: number of columns, those on the right, that edits count as the prompts'; all by default.
        sharding: where rows lie on a mesh; left to the compiler if None.

    Raises:
        SiteError: the model was saved without a head of next tokens.
    """
    if model.causal:  # `new_cache` refuses the others
        require_decoder(model)
    columns: Any = np.int32(tokens.shape[1] if width is None else width)
    options: dict[str, Any] = {"capacity": capacity, "log_probs": log_probs, "capture": capture}
    options["sharding"] = sharding
    begun = _start if runs_by_block(model, params) else _start_at_once
    return begun(model, params, tokens, mask, columns, stop, edit, pad_id, **options)


def _start(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    width: Array,
    stop: Stop,
    edit: Mapping[str, Partial],
    pad_id: int | Array,
    *,
    capacity: int,
    log_probs: bool,
    capture: tuple[str, ...],
    sharding: NamedSharding | None,
) -> GenerationState:
    new = unread(model, params, tokens, mask, width, stop, pad_id, capacity=capacity, log_probs=log_probs)
    new = constrained(new, sharding)
    if tokens.shape[1] > 1:
        before, real = _but_last(tokens), _but_last(mask)
        places = _places(real, width, prompt=tokens.shape[1]) if edit else None
        cache = _read(model, params, before, real, new.cache, places, edit)
        new = replace(new, cache=cache)
    captured = _nothing_captured(model, params, new.cache, edit, capture)
    return constrained(replace(new, captured=captured), sharding)


_start_at_once = jax.jit(_start, static_argnames=("model", "capacity", "log_probs", "capture", "sharding"))


def unread(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    width: Any,
    stop: Stop,
    pad_id: int | Array = 0,
    *,
    capacity: int,
    log_probs: bool = False,
    cache: Cache | None = None,
    slots: int | None = None,
) -> GenerationState:
    """The state before anything is read; see `start`.

    Args:
        model: a decoder.
        params: its parameters.
        tokens: the prompts.
        mask: True for real tokens.
        width: number of columns that edits count.
        stop: rule that ends rows.
        pad_id: what stands after a row's end.
        capacity: largest number of tokens that may be generated.
        log_probs: whether log-probabilities are kept.
        cache: what was read before; an empty one if None.
        slots: number of slots of an empty cache; as many as the tokens take if None.
    """
    batch, length = tokens.shape
    sizes = {"vocab": model.config.vocab_size, "capacity": capacity}
    new = _empty(tokens, mask, width, stop, pad_id, **sizes, log_probs=log_probs)
    if cache is None:
        dtype = params["embed"]["embedding"].dtype
        cache = model.new_cache(batch, length - 1 + capacity if slots is None else slots, dtype)
    return replace(new, cache=cache)


def read_on(model: Model, params: Params, tokens: Array, mask: Array, cache: Cache) -> Cache:
    """The cache given, with these tokens behind those in it; its memory becomes that of the result."""
    reading = _read if runs_by_block(model, params, cache) else _read_at_once
    return reading(model, params, tokens, mask, cache, None, {})


@partial(jax.jit, static_argnames=("vocab", "capacity", "log_probs"))
def _empty(
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    width: Int[Array, ""],
    stop: Stop,
    pad_id: int | Array,
    *,
    vocab: int,
    capacity: int,
    log_probs: bool,
) -> GenerationState:
    """What `unread` makes but for the cache: one program for models of every depth."""
    batch, monitor = tokens.shape[0], stop.monitor
    rows = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], tokens.shape)
    ids = jnp.where(mask, tokens, vocab)  # padding falls outside, and is dropped
    return GenerationState(
        cache=NO_CACHE,
        last=tokens[:, -1],
        seen=jnp.zeros((batch, vocab), jnp.bool_).at[rows, ids].set(True, mode="drop"),
        recent=stop.no_recent(batch),
        tokens=jnp.broadcast_to(jnp.asarray(pad_id, jnp.int32), (batch, capacity)),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, jnp.bool_),
        steps=jnp.int32(0),
        prompt=tokens,
        width=width,
        log_probs=jnp.zeros((batch, capacity), jnp.float32) if log_probs else None,
        readings=None if monitor is None else jnp.zeros((batch, capacity, monitor.readings), jnp.float32),
    )


NOTHING: Any = np.zeros((0, 0), np.int32)
NO_CACHE = Cache((), (), NOTHING, NOTHING)
"""What stands for a cache where a program takes the rest of a state: what passes through is copied."""


def _but_last(columns: Array) -> Array:
    # Through numpy where there are values: a slice would be a program of its own.
    return columns[:, :-1] if isinstance(columns, Tracer) else on_device(np.asarray(columns)[:, :-1])


def on_device(values: Any) -> Array:
    """Values of numpy where JAX computes: `jnp.asarray` compiles a program for each of their shapes."""
    return jax.device_put(np.ascontiguousarray(values))


def _read(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    cache: Cache,
    places: TokenPlaces | None,
    edit: Mapping[str, Partial],
) -> Cache:
    """The cache given, with tokens behind those in it."""
    if runs_by_block(model, params, cache):
        forward = Blockwise(model, params, edit=edit)
        read = forward(tokens, cache, mask=mask, logits=False, places=places)
    else:
        read = model.apply(params, tokens, mask=mask, cache=cache, edit=edit, logits=False, places=places)
    assert read.cache is not None
    return read.cache


@partial(jax.jit, static_argnames="prompt")
def _places(mask: Bool[Array, "batch length"], width: Int[Array, ""], *, prompt: int) -> TokenPlaces:
    """Places of a whole text so far.

    Args:
        mask: True for real tokens.
        width: columns of the prompts as they were given, the last ones of those read.
        prompt: columns of the prompts as they were read.
    """
    slots = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32)[None], mask.shape)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return TokenPlaces(positions, mask, slots - (prompt - width), slots >= prompt)


@jax.jit
def step_places(progress: GenerationState) -> TokenPlaces:
    """Places of the token that each row reads in its next step."""
    real = jnp.ones((progress.last.shape[0], 1), jnp.bool_)
    written = progress.lengths[:, None]
    return TokenPlaces(progress.cache.positions(real), real, progress.width - 1 + written, written > 0)


def read_again(
    model: Model, params: Params, progress: GenerationState, edit: Mapping[str, Partial]
) -> GenerationState:
    """The state with a cache that is computed anew from all tokens, as one text that is read at once.

    Where rotations depend on how long a text is, what a cache holds of its beginning does too.
    """
    lengths, prompt = on_host(progress.lengths), progress.prompt.shape[1]
    cache = progress.cache
    longest = int(lengths.max())
    tokens = jnp.concatenate([progress.prompt, progress.tokens[:, :longest]], axis=1)
    # The last token is read as well, for its position decides, and then forgotten: the next step reads it.
    # Rows that have ended stay in step with the others where all are equally long.
    lengths = np.full_like(lengths, longest) if cache.even else lengths
    real = np.arange(longest + 1)[None] <= lengths[:, None]
    mask = jnp.concatenate([cache.mask[:, : prompt - 1], on_device(real)], axis=1)
    places = _places(mask, progress.width, prompt=prompt) if edit else None
    empty = jax.tree.map(jnp.zeros_like, cache)
    reading = _read if runs_by_block(model, params, cache) else _read_at_once
    read = reading(model, params, tokens, mask, empty, places, edit)
    slots = prompt - 1 + lengths
    return replace(progress, cache=read.rewind(int(slots[0]) if cache.even else on_device(slots)))


_read_at_once = jax.jit(_read, static_argnames="model")


def _nothing_captured(
    model: Model, params: Params, cache: Cache, edit: Mapping[str, Partial], capture: tuple[str, ...]
) -> dict[str, Array]:
    """Zeros in the shapes that one step captures."""
    if not capture:
        return {}

    def step() -> dict[str, Array]:
        tokens = jnp.zeros((cache.mask.shape[0], 1), jnp.int32)
        out = model.apply(params, tokens, cache=cache, edit=edit, capture=capture)
        return last_token(token_axes(model, capture), out.captured)

    return {site: jnp.zeros(x.shape, x.dtype) for site, x in jax.eval_shape(step).items()}


def token_axes(model: Model, sites: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Which axis of each of these sites is that of the tokens."""
    shapes = {site: model.sites()[site] for site in sites}
    return tuple(
        (site, next(n for n, size in enumerate(shape) if size in ("length", "query")))
        for site, shape in shapes.items()
    )


def last_token(axes: Sequence[tuple[str, int]], captured: Mapping[str, Array]) -> dict[str, Array]:
    """Captured sites of one token a row, without the axis of tokens that `token_axes` names."""
    return {site: jnp.squeeze(captured[site], axis) for site, axis in axes}
