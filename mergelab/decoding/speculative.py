"""Speculative decoding: a small model drafts tokens, and the model reads all of them in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from mergelab.decoding.generation import Generated, begin_samples, generated_of
from mergelab.decoding.generation_state import NO_CACHE, GenerationState, on_device
from mergelab.decoding.passes import Reader, check_one_rotation, check_takes_back, uneven
from mergelab.decoding.samplers import Sampler, greedy
from mergelab.decoding.spread import on_host
from mergelab.decoding.steps import grown_rows
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transforms import History, require, transform
from mergelab.errors import DecodingError
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, TokenPlaces, as_partials

__all__ = ["Speculated", "speculate"]

_DRAFT, _ACCEPT, _OWN = 1, 2, 3  # what the key of a token is folded with, for its three draws


@dataclass(frozen=True)
class Speculated:
    """What was generated, and how much of it was drafted.

    Attributes:
        generated: tokens and their log-probabilities, as `generate` gives them.
        rounds: int `[batch]`, passes of the model for each row.
        accepted: int `[batch]`, drafted tokens that were kept.
    """

    generated: Generated
    rounds: np.ndarray
    accepted: np.ndarray


def speculate(
    model: Model,
    params: Params,
    draft: Model,
    draft_params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    ahead: int = 4,
    sampler: Sampler | None = None,
    key: Key[Array, "*batch"] | int = 0,
    stop: Stop | None = None,
    edit: Mapping[str, Edit] | None = None,
    pad_id: int = 0,
    samples: int = 1,
    log_probs: bool = False,
    shared: int | None = None,
) -> Speculated:
    """Continues every prompt as `generate` does, in fewer passes of the model.

    The draft chooses `ahead` tokens, one after the other, with the same sampler. The model reads them at
    once; a token `x` is kept with probability `min(1, p(x) / q(x))`, `p` being the model's distribution and
    `q` the draft's, both after transforms. The first that is not kept is drawn anew from the positive part of
    `p - q`, and where all are kept one more is drawn from `p` (Leviathan et al., arXiv:2211.17192; Chen et
    al., 2302.01318). So every token has the model's own distribution, and greedy decoding gives its own
    tokens, up to the rounding of a pass over several.

    Args:
        model: a decoder.
        params: its parameters.
        draft: a decoder with the same vocabulary, usually much smaller; its number of rows may be another
            (`shared`).
        draft_params: its parameters.
        tokens: int `[batch, length]`, padded on the left (`pad_prompts`).
        mask: bool `[batch, length]`, True for real tokens; None if there is no padding.
        max_new_tokens: largest number of tokens that are generated per row.
        ahead: number of tokens that are drafted at a time.
        sampler: choice of tokens; `greedy()` by default. Its transforms see no sites.
        key: a seed or a key, folded with the row's number; or one key per row of the result. Draws are others
            than those of `generate`, of the same distribution.
        stop: rule that ends rows; never by default.
        edit: edits of the model, as in `generate`; the draft is not edited.
        pad_id: token that fills `Generated.tokens` after a row's end.
        samples: number of continuations of each prompt, which is read once by each of the two.
        log_probs: whether the log-probability of every token is kept: the model's, before transforms.
        shared: number of tokens that both have, ids from 0 on, where their vocabularies are filled up to
            other sizes: the draft proposes no others. Equal sizes are needed if None.

    Raises:
        DecodingError: as `generate`; the draft has another vocabulary, or `ahead` is not positive.
    """
    theirs, ours = draft.config.vocab_size, model.config.vocab_size
    if shared is not None:
        most = min(theirs, ours)
        require("speculate(shared)", shared, 1 <= shared <= most, f"1 to {most}, the smaller vocabulary")
    elif theirs != ours:
        raise DecodingError(
            f"the draft has a vocabulary of {theirs} tokens and the model one of {ours}; a draft must have "
            "the model's own."
        )
    proposes = ours if shared is None else int(shared)
    require("speculate(ahead)", ahead, 1 <= ahead <= 64, "1 to 64 tokens")
    stop, sampler = stop or stop_at(), sampler or greedy()
    require("speculate(stop)", "a monitor", stop.monitor is None, "a rule without one")
    prompts = np.asarray(tokens)
    begun: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens, "spare": ahead + 1}
    for one in (model, draft):
        check_takes_back(one, "speculate")
        check_one_rotation(one, prompts, mask, max_new_tokens + ahead)
    progress, keys, spread = begin_samples(
        model, params, prompts, mask, key=key, stop=stop, edit=edit, pad_id=pad_id, log_probs=log_probs,
        **begun,
    )  # fmt: skip
    guess, _, _ = begin_samples(
        draft, draft_params, np.minimum(prompts, theirs - 1), mask, stop=stop, **begun
    )
    reads, drafted = Reader(model, params, edit=edit), Reader(draft, draft_params)
    edits, cache, its_cache = as_partials(edit), uneven(progress.cache), uneven(guess.cache)
    rest, rows = replace(progress, cache=NO_CACHE), progress.last.shape[0]
    rounds, accepted = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    limit = on_device(np.int32(max_new_tokens))
    while True:
        live = ~on_host(rest.finished) & (on_host(rest.lengths) < max_new_tokens)
        if not live.any():
            break
        look, token, guesses, scores = rest, rest.last, [], []
        for _ in range(ahead):
            out = drafted(_known(token, theirs), its_cache)
            assert out.logits is not None and out.cache is not None
            its_cache = out.cache
            its = _proposed(out.logits, size=ours, shared=proposes)
            look, scored = _guess(look, its, sampler, keys)
            token = look.last
            guesses.append(token)
            scores.append(scored)
        out = drafted(_known(token, theirs), its_cache)  # so that its cache holds all that may be kept
        assert out.cache is not None
        its_cache = out.cache
        places = _places(rest, cache, ahead) if edits else None
        out = reads(_side_by_side(rest.last, guesses), cache, places)
        assert out.logits is not None and out.cache is not None
        before = on_host(rest.lengths)
        rest, kept = _judge(rest, out.logits, guesses, scores, sampler, keys, stop, limit)
        cache, its_cache = (_back(one, kept, read=ahead + 1) for one in (out.cache, its_cache))
        rounds += live
        accepted += np.minimum(np.maximum(on_host(kept) - 1, 0), on_host(rest.lengths) - before)
    found = generated_of(rest, max_new_tokens)
    if spread is not None:
        found = spread.without_padding(found)
        rounds, accepted = rounds[: spread.rows], accepted[: spread.rows]
    return Speculated(found, rounds, accepted)


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


@jax.jit
def _side_by_side(last: Array, guesses: list[Array]) -> Int[Array, "batch new"]:
    return jnp.stack([last, *guesses], axis=1)


@partial(jax.jit, static_argnames="ahead")
def _places(p: GenerationState, cache: Cache, ahead: int) -> TokenPlaces:
    real = jnp.ones((p.last.shape[0], ahead + 1), jnp.bool_)
    written = p.lengths[:, None] + jnp.arange(ahead + 1, dtype=jnp.int32)[None]
    return TokenPlaces(cache.positions(real), real, p.width - 1 + written, written > 0)


@partial(jax.jit, static_argnames="read", donate_argnames="cache")
def _back(cache: Cache, kept: Int[Array, " batch"], *, read: int) -> Cache:
    """The cache with the first `kept` of the `read` tokens that were read last."""
    lengths = cache.length - read + kept
    return cache.rewind(lengths[0] if lengths.shape[0] == 1 else lengths)


def _distribution(sampler: Sampler, logits: Array, p: GenerationState) -> Float[Array, "batch vocab"]:
    """Probabilities of the next token as the sampler draws it: all on one where it takes the likeliest."""
    scores = sampler.transforms(logits.astype(jnp.float32), History(p.seen, p.lengths, {}, p.tokens))
    if sampler.random:
        return jax.nn.softmax(scores, axis=-1)
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=jnp.float32)


def _drawn(probabilities: Array, keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities)).astype(jnp.int32)


def _keys(keys: Key[Array, " batch"], lengths: Array, purpose: int) -> Key[Array, " batch"]:
    def one(key: Array, length: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, length.astype(jnp.uint32)), np.uint32(purpose))

    return jax.vmap(one)(keys, lengths)


@jax.jit
def _guess(
    p: GenerationState, logits: Float[Array, "batch vocab"], sampler: Sampler, keys: Key[Array, " batch"]
) -> tuple[GenerationState, Float[Array, "batch vocab"]]:
    """The rows with a drafted token more, and what it was drawn from."""
    scored = _distribution(sampler, logits, p)
    token = _drawn(scored, _keys(keys, p.lengths, _DRAFT))
    return _with(p, token), scored


def _with(p: GenerationState, token: Int[Array, " batch"]) -> GenerationState:
    """What transforms and edits see of the rows once a token is behind them."""
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    return replace(
        p,
        last=token,
        seen=p.seen.at[rows, token].set(True),
        tokens=p.tokens.at[rows, p.lengths].set(token, mode="drop"),
        lengths=p.lengths + 1,
    )


@transform
class _Given:
    """A sampler of tokens that are known."""

    token: ArrayLike

    def __call__(self, logits: Array, history: History, keys: Array) -> Array:
        return jnp.asarray(self.token)


@jax.jit
def _judge(
    p: GenerationState,
    logits: Float[Array, "batch new vocab"],
    guesses: list[Int[Array, " batch"]],
    scores: list[Float[Array, "batch vocab"]],
    sampler: Sampler,
    keys: Key[Array, " batch"],
    stop: Stop,
    limit: Int[Array, ""],
) -> tuple[GenerationState, Int[Array, " batch"]]:
    """The rows with the tokens that are kept and one of the model's own, and how many slots stay."""
    guessed = jnp.stack([*guesses, guesses[-1]])  # behind the last there is no guess
    theirs = jnp.stack([*scores, jnp.zeros_like(scores[-1])])
    last_one = jnp.arange(len(guessed), dtype=jnp.int32) == len(guesses)
    alive = ~p.finished & (p.lengths < limit)

    def one(
        carry: tuple[GenerationState, GenerationState, Array, Array], x: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[GenerationState, GenerationState, Array, Array], None]:
        p, look, going, kept = carry
        raw, guess, q, beyond = x
        own = _distribution(sampler, raw, look)
        pick = guess[:, None]
        ours, its = (jnp.take_along_axis(d, pick, axis=1)[:, 0] for d in (own, q))
        chance = jax.vmap(jax.random.uniform)(_keys(keys, look.lengths, _ACCEPT))
        agreed = (chance * its < ours) & ~beyond
        left = jnp.maximum(own - q, 0.0)
        # Where nothing is left by rounding, the two are equal, and the model's own does.
        left = jnp.where(left.sum(axis=1, keepdims=True) > 0, left, own)
        token = jnp.where(agreed, guess, _drawn(left, _keys(keys, look.lengths, _OWN)))
        halted = p.finished | ~going | (p.lengths >= limit)
        grown = grown_rows((), replace(p, finished=halted), raw[:, None], {}, _Given(token), keys, stop)
        grown = replace(grown, finished=jnp.where(halted, p.finished, grown.finished))
        return (grown, _with(look, guess), going & agreed, kept + going.astype(jnp.int32)), None

    first = (p, p, alive, jnp.zeros_like(p.lengths))
    xs = (jnp.moveaxis(logits, 1, 0), guessed, theirs, last_one)
    (p, _, _, kept), _ = jax.lax.scan(one, first, xs)
    return p, kept
