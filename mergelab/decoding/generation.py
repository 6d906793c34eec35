"""Generation with a cache, from token ids to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from mergelab.activations.batches import bucket_size, check_prompts, widen
from mergelab.compat import register_dataclass
from mergelab.decoding.generation_state import GenerationState, on_device, start
from mergelab.decoding.samplers import Sampler, greedy, row_keys
from mergelab.decoding.spread import Spread, spread_of
from mergelab.decoding.steps import Steps
from mergelab.decoding.stop import Stop, stop_at
from mergelab.decoding.transforms import require
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials, match_sites
from mergelab.models.token_checks import learned_positions

__all__ = ["Generated", "begin", "begin_padded", "begin_samples", "generate", "generated_of"]


@register_dataclass
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
        readings: float32 `[batch, max_new_tokens, readings]`, what the monitor of the stop rule read in the
            pass that chose each token; None without one.
    """

    tokens: Int[Array, "batch max_new_tokens"]
    lengths: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    log_probs: Float[Array, "batch max_new_tokens"] | None = None
    captured: dict[str, Array] = field(default_factory=dict)
    readings: Float[Array, "batch max_new_tokens readings"] | None = None

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
    capture: str | Sequence[str] = (),
) -> Generated:
    """Continues every prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its own prompt and key only: padding is never attended to, the `n`-th token is
    drawn with `fold_in(row's key, n)`, and rows that have ended change no other. (Another width of padding
    may round logits differently.) Compiled once per batch size and per bucket of prompt length and
    `max_new_tokens` (`bucket_size`); settings of samplers and stop rules are arguments of the program. On one
    CPU device layers that are alike share one program (`mergelab.models.blockwise`). Where the parameters lie
    on a mesh, its axes `data` and `fsdp` split the rows; rows that fill up the parts are in no result.

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
    progress, keys, spread = begin_samples(
        model,
        params,
        tokens,
        mask,
        samples=samples,
        key=key,
        max_new_tokens=max_new_tokens,
        stop=stop,
        edit=edit,
        pad_id=pad_id,
        log_probs=log_probs,
        capture=capture,
    )
    steps = Steps(model, params, sampler=sampler, keys=keys, stop=stop, edit=edits)
    found = generated_of(steps.advance(progress, max_new_tokens), max_new_tokens)
    return found if spread is None else spread.without_padding(found)


def generated_of(done: GenerationState, max_new_tokens: int) -> Generated:
    """What a state holds of the tokens that were asked for."""
    cut = [None if x is None else x[:, :max_new_tokens] for x in (done.log_probs, done.readings)]
    return Generated(
        done.tokens[:, :max_new_tokens], done.lengths, done.finished, cut[0], done.captured, cut[1]
    )


def begin_samples(
    model: Model,
    params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    samples: int = 1,
    key: Key[Array, "*batch"] | int = 0,
    **options: Any,
) -> tuple[GenerationState, Key[Array, " batch"], Spread | None]:
    """`begin_padded`, each prompt read once, then every row `samples` times.

    Among its options is `spare`: room for so many tokens that are read and taken back.

    Returns:
        The state, a key for each of its rows, and how they lie on a mesh; None without one.
    """
    require("generate(samples)", samples, samples >= 1, "at least 1")
    progress, spread = begin_padded(model, params, tokens, mask, **options)
    if spread is None:
        progress = progress.repeat(samples) if samples > 1 else progress
        return progress, row_keys(key, progress.last.shape[0]), None
    progress, spread = spread.repeat(progress, samples) if samples > 1 else (progress, spread)
    progress = replace(progress, finished=spread.is_padding())
    return progress, spread.place_keys(row_keys(key, spread.rows)), spread


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
    capture: str | Sequence[str] = (),
) -> GenerationState:
    """Checks prompts, pads them to a bucket, and reads them: the first half of `generate`.

    On a mesh rows are split where their number divides; otherwise every device computes all of them.

    Raises:
        DecodingError: as `generate`.
        SiteError: as `generate`.
    """
    return _begin(
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
        pad=False,
    )[0]


def begin_padded(
    model: Model,
    params: Params,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    **options: Any,
) -> tuple[GenerationState, Spread | None]:
    """`begin` with rows added, where that lets a mesh split them; rows that were added have ended.

    Returns:
        The state, and how its rows lie on the mesh; None without one.
    """
    progress, spread = _begin(model, params, tokens, mask, **options, pad=True)
    return progress if spread is None else replace(progress, finished=spread.is_padding()), spread


def _begin(
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
    capture: str | Sequence[str] = (),
    spare: int = 0,
    pad: bool,
) -> tuple[GenerationState, Spread | None]:
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
    patterns = [capture] if isinstance(capture, str) else capture
    sites = (name for pattern in patterns for name in match_sites(model.sites(), pattern))
    width = prompts.shape[1]
    prompts, real = widen(prompts, real, bucket_size(width))
    spread = spread_of(params, len(prompts), pad=pad)
    place = on_device if spread is None else spread.place
    begun = start(
        model,
        params,
        place(prompts.astype(np.int32)),
        place(real),
        capacity=bucket_size(max_new_tokens + spare),
        stop=stop,
        edit=as_partials(edit),
        pad_id=pad_id,
        log_probs=log_probs,
        capture=tuple(dict.fromkeys(sites)),
        width=width,
        sharding=None if spread is None else spread.sharding,
    )
    return begun, spread
