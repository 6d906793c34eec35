"""What drafts tokens for `speculate`: a smaller model, or the model's own layer of multi-token prediction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mergelab.decoding.generation_state import GenerationState
from mergelab.decoding.passes import Reader, uneven
from mergelab.decoding.samplers import Sampler
from mergelab.decoding.transforms import History
from mergelab.models.cache import Cache
from mergelab.models.further_tokens import FurtherLayer
from mergelab.models.model import Model, Params

__all__ = [
    "Draft",
    "LayerDraft",
    "ModelDraft",
    "distribution",
    "drawn",
    "keys_of",
    "taken_back",
    "with_token",
]

Guesses = tuple[list[Int[Array, " batch"]], list[Float[Array, "batch vocab"]]]
"""Drafted tokens, one array for each step, and what each was drawn from."""

_DRAFT = 1  # what the key of a token is folded with, for this draw


class Draft(Protocol):
    """What `speculate` asks of a draft; it holds what it has read of the rows."""

    def propose(
        self, rows: GenerationState, ahead: int, sampler: Sampler, keys: Key[Array, " batch"]
    ) -> Guesses:
        """`ahead` tokens that may follow each row, and their distributions."""
        ...

    def settle(
        self,
        rows: GenerationState,
        guesses: list[Int[Array, " batch"]],
        hidden: Float[Array, "batch new width"],
        kept: Int[Array, " batch"],
    ) -> None:
        """Takes note of how the rows went on.

        Args:
            rows: the rows once the model has judged the guesses.
            guesses: the guesses.
            hidden: the model's last hidden states of the token before them, and of each.
            kept: number of those tokens that stay, of each row.
        """
        ...


class ModelDraft:
    """A smaller model, which reads the text as it stands.

    Args:
        model, params: the model.
        cache: its cache, with the prompts but their last token.
        size: tokens of the vocabulary that is drafted for.
        shared: how many of them, ids from 0 on, the draft has: it proposes no others.
    """

    def __init__(self, model: Model, params: Params, cache: Cache, *, size: int, shared: int) -> None:
        self._reads, self._cache = Reader(model, params), uneven(cache)
        self._own, self._size, self._shared = model.config.vocab_size, size, shared

    def propose(
        self, rows: GenerationState, ahead: int, sampler: Sampler, keys: Key[Array, " batch"]
    ) -> Guesses:
        """See `Draft`."""
        look, guesses, scores = rows, [], []
        for _ in range(ahead):
            its = _proposed(self._read(look.last), size=self._size, shared=self._shared)
            look, scored = _guess(look, its, sampler, keys)
            guesses.append(look.last)
            scores.append(scored)
        self._read(look.last)  # so that its cache holds all that may be kept
        return guesses, scores

    def _read(self, token: Array) -> Array:
        out = self._reads(_known(token, self._own), self._cache)
        assert out.logits is not None and out.cache is not None
        self._cache = out.cache
        return out.logits

    def settle(self, rows: GenerationState, guesses: list[Array], hidden: Array, kept: Array) -> None:
        """See `Draft`."""
        self._cache = taken_back(self._cache, kept, read=len(guesses) + 1)


@partial(jax.jit, static_argnames="size")
def _known(token: Int[Array, " batch"], size: int) -> Int[Array, "batch 1"]:
    """What the draft reads: of a token that it does not have, its last; what it proposes is judged anyway."""
    return jnp.minimum(token, size - 1)[:, None]


@partial(jax.jit, static_argnames=("size", "shared"))
def _proposed(
    logits: Float[Array, "batch new theirs"], *, size: int, shared: int
) -> Float[Array, "batch vocab"]:
    """The draft's logits over the model's vocabulary, `-inf` for what the two do not share."""
    kept = logits[:, -1, :shared]
    return jnp.pad(kept, ((0, 0), (0, size - shared)), constant_values=-jnp.inf)


class LayerDraft:
    """The model's own layer of multi-token prediction, which reads its hidden states.

    Behind the last hidden state of the model it goes on with its own. What it has read of a guess is read
    again, with the model's hidden states, once the guess is kept.

    Args:
        layer, own: the layer and its parameters.
        params: the model's parameters.
        rows: the rows before the first token is generated.
        samples: number of rows that each prompt has, one behind the other; 1 where they lie otherwise.
        room: number of tokens that are generated at most, and read and taken back.
    """

    def __init__(
        self,
        layer: FurtherLayer,
        own: Params,
        params: Params,
        rows: GenerationState,
        *,
        samples: int,
        room: int,
    ) -> None:
        self._layer, self._own, self._params = layer, own, params
        before = rows.prompt.shape[1] - 1
        prompts, mask = rows.prompt[::samples], rows.cache.mask[::samples, :before]
        cache = layer.new_cache(prompts.shape[0], before + room, params["embed"]["embedding"].dtype)
        logits, hidden, cache = _read_prompts(layer, own, params, prompts, mask, cache)
        times = partial(jnp.repeat, repeats=samples, axis=0)
        self._next = (logits, hidden) if samples == 1 else (times(logits), times(hidden))
        self._cache = uneven(cache if samples == 1 else cache.repeat(samples))

    def propose(
        self, rows: GenerationState, ahead: int, sampler: Sampler, keys: Key[Array, " batch"]
    ) -> Guesses:
        """See `Draft`."""
        look, guesses, scores, (logits, hidden) = rows, [], [], self._next
        for step in range(ahead):
            if step:
                logits, hidden, self._cache = _read_pair(
                    self._layer, self._own, self._params, look.last, hidden, self._cache
                )
            look, scored = _guess(look, logits, sampler, keys)
            guesses.append(look.last)
            scores.append(scored)
        return guesses, scores

    def settle(self, rows: GenerationState, guesses: list[Array], hidden: Array, kept: Array) -> None:
        """See `Draft`."""
        logits, stream, self._cache = _read_kept(
            self._layer, self._own, self._params, guesses, rows.last, hidden, kept, self._cache
        )
        self._next = logits, stream


@partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def _read_prompts(
    layer: FurtherLayer,
    own: Params,
    params: Params,
    prompts: Int[Array, "batch length"],
    mask: Bool[Array, "batch before"],
    cache: Cache,
) -> tuple[Array, Array, Cache]:
    """What the layer guesses behind the prompts, each token read with the hidden state of the one before."""
    if prompts.shape[1] == 1:  # no token has one before it: any guess will do
        config = layer.model.config
        shape = prompts.shape[:1]
        return jnp.zeros((*shape, config.vocab_size)), jnp.zeros((*shape, config.d_model)), cache
    out = layer.model.apply(params, prompts[:, :-1], mask=mask, capture="unembed.input", logits=False)
    hidden = out.captured["unembed.input"]
    logits, stream, cache = layer.apply(own, params, prompts[:, 1:], hidden, cache, mask)
    return logits[:, -1], stream[:, -1], cache


@partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def _read_pair(
    layer: FurtherLayer, own: Params, params: Params, token: Array, hidden: Array, cache: Cache
) -> tuple[Array, Array, Cache]:
    logits, stream, cache = layer.apply(own, params, token[:, None], hidden[:, None], cache)
    return logits[:, -1], stream[:, -1], cache


@partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def _read_kept(
    layer: FurtherLayer,
    own: Params,
    params: Params,
    guesses: list[Int[Array, " batch"]],
    last: Int[Array, " batch"],
    hidden: Float[Array, "batch new width"],
    kept: Int[Array, " batch"],
    cache: Cache,
) -> tuple[Array, Array, Cache]:
    """Reads the tokens that were kept and the last one, each with the model's hidden state before it."""
    cache = _rewound(cache, cache.length - (len(guesses) - 1))
    rows, end = jnp.arange(last.shape[0], dtype=jnp.int32), jnp.maximum(kept - 1, 0)
    tokens = jnp.stack([*guesses, guesses[-1]], axis=1).at[rows, end].set(last)
    logits, stream, cache = layer.apply(own, params, tokens, hidden, cache)
    cache = _rewound(cache, cache.length - tokens.shape[1] + kept)
    return logits[rows, end], stream[rows, end], cache


def _rewound(cache: Cache, lengths: Int[Array, " batch"]) -> Cache:
    return cache.rewind(lengths[0] if lengths.shape[0] == 1 else lengths)


@partial(jax.jit, static_argnames="read", donate_argnames="cache")
def taken_back(cache: Cache, kept: Int[Array, " batch"], *, read: int) -> Cache:
    """The cache with the first `kept` of the `read` tokens that were read last."""
    return _rewound(cache, cache.length - read + kept)


def distribution(sampler: Sampler, logits: Array, p: GenerationState) -> Float[Array, "batch vocab"]:
    """Probabilities of the next token as the sampler draws it: all on one where it takes the likeliest."""
    scores = sampler.transforms(logits.astype(jnp.float32), History(p.seen, p.lengths, {}, p.tokens))
    if sampler.random:
        return jax.nn.softmax(scores, axis=-1)
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=jnp.float32)


def drawn(probabilities: Array, keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """A token of each row."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities)).astype(jnp.int32)


def keys_of(keys: Key[Array, " batch"], lengths: Array, purpose: int) -> Key[Array, " batch"]:
    """The key of each row's next token, for one of its draws."""

    def one(key: Array, length: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, length.astype(jnp.uint32)), jnp.uint32(purpose))

    return jax.vmap(one)(keys, lengths)


@jax.jit
def _guess(
    p: GenerationState, logits: Float[Array, "batch vocab"], sampler: Sampler, keys: Key[Array, " batch"]
) -> tuple[GenerationState, Float[Array, "batch vocab"]]:
    """The rows with a drafted token more, and what it was drawn from."""
    scored = distribution(sampler, logits, p)
    token = drawn(scored, keys_of(keys, p.lengths, _DRAFT))
    return with_token(p, token), scored


def with_token(p: GenerationState, token: Int[Array, " batch"]) -> GenerationState:
    """What transforms and edits see of the rows once a token is behind them."""
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    return replace(
        p,
        last=token,
        seen=p.seen.at[rows, token].set(True),
        tokens=p.tokens.at[rows, p.lengths].set(token, mode="drop"),
        lengths=p.lengths + 1,
    )
