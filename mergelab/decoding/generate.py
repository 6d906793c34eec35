"""Generation from prompts of tokens: one pass over the prompts, then a compiled loop with a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Key

from mergelab.activations.batches import bucket_size, check_prompts, widen
from mergelab.decoding.progress import Progress, advance, start
from mergelab.decoding.samplers import Sampler, greedy, row_keys
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transform import require
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials

__all__ = ["Generated", "begin", "generate"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: int32 `[batch, max_new_tokens]`, without the prompt; `pad_id` after a row's end.
        lengths: int32 `[batch]`, tokens of each row, what ended it among them.
        finished: bool `[batch]`, whether the stop rule ended the row (and not `max_new_tokens`).
    """

    tokens: Int[Array, "batch max_new_tokens"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]

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
        max_new_tokens: at most so many tokens are generated a row.
        sampler: how tokens are chosen; `greedy()` by default.
        key: a seed or a key, folded with the row's number; or one key per row.
        stop: when rows end; never by default.
        edit: functions by site name or glob pattern, as in `Model.apply`. They see `[batch, length, ...]`,
            first with all of the prompt but its last token (padding included), then with one token at a
            time. Give one that holds arrays as `jax.tree_util.Partial(function, *arrays)` to change them
            without compiling again; `function` comes with the arrays first.
        pad_id: fills `Generated.tokens` after a row's end.

    Raises:
        DecodingError: prompts that are empty or padded elsewhere, unknown token ids, or more tokens than
            the model has positions.
        SiteError: an edit names no site, or changes shape or dtype.
    """
    stop, sampler, edits = stop or stop_at(), sampler or greedy(), as_partials(edit)
    progress = begin(
        model, params, tokens, mask, max_new_tokens=max_new_tokens, stop=stop, edit=edit, pad_id=pad_id
    )
    keys = row_keys(key, progress.last.shape[0])
    limit = jnp.int32(max_new_tokens)
    done = advance(model, params, progress, limit, sampler=sampler, keys=keys, stop=stop, edit=edits)
    return Generated(done.tokens[:, :max_new_tokens], done.lengths, done.finished)


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
) -> Progress:
    """Checks prompts, pads them to a bucket, and reads them: the first half of `generate`.

    Raises:
        DecodingError: as `generate`.
    """
    prompts = np.asarray(tokens)
    integral = prompts.dtype.kind in "iu"
    require("generate(tokens)", str(prompts.dtype), integral, "token ids of an integer type")
    real = np.ones(prompts.shape, bool) if mask is None else np.asarray(mask, bool)
    check_prompts(prompts, real, model.config.vocab_size)
    require("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    longest = int(real.sum(axis=1).max()) + max_new_tokens - 1  # the last token is never read
    if not model.config.rotary:
        room = model.config.max_length
        place = f"generate(max_new_tokens={max_new_tokens})"
        require(place, f"{longest} positions", longest <= room, f"at most the model's {room} learned ones")
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
    )
