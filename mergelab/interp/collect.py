"""Activations of many prompts at some sites, at all of their tokens or one token each, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, match_sites
from mergelab.models.token_checks import check_tokens

__all__ = ["Patterns", "batches", "check_pairs", "check_prompts", "collect", "stream_sites"]

Patterns = str | Sequence[str]
"""Names or glob patterns of sites."""


def stream_sites(model: Model, patterns: Patterns) -> tuple[str, ...]:
    """The sites that patterns select, in forward order; all must have the axes `[batch, length, ...]`.

    Raises:
        SiteError: a pattern selects nothing, or a site whose second axis is not the tokens.
    """
    wanted = [patterns] if isinstance(patterns, str) else patterns
    found = {name for pattern in wanted for name in match_sites(model.sites(), pattern)}
    for name in found:
        if model.sites()[name][:2] != ("batch", "length"):
            raise SiteError(
                f"the site {name!r} has shape {list(model.sites()[name])}, which is not one activation for "
                "each token; take sites of shape [batch, length, ...]."
            )
    return tuple(name for name in model.sites() if name in found)


def collect(
    model: Model,
    params: Params,
    tokens: Any,
    sites: Patterns,
    *,
    mask: Any = None,
    position: int | None = None,
    batch: int = 32,
    edit: dict[str, Edit] | None = None,
) -> dict[str, np.ndarray]:
    """Runs prompts and keeps what some sites hold, in float32 on the host.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        tokens: `[prompts, length]`.
        sites: names or patterns; their shape must be `[batch, length, ...]`.
        mask: True for real tokens, `[prompts, length]`; all by default.
        position: keep this real token of each prompt (-1: its last); all tokens by default.
        batch: prompts in one pass.
        edit: edits to run them with.

    Returns:
        By site `[prompts, ...]` for one position, else `[real tokens, ...]` in the order of the prompts.

    Raises:
        SiteError: as `stream_sites`, or a prompt has no token at the position.
    """
    names = stream_sites(model, sites)
    tokens, real = check_prompts(model, tokens, mask)
    places = None if position is None else _places(real, position)
    parts: list[tuple[np.ndarray, ...]] = []
    for chosen, count in batches(len(tokens), batch):
        found = _captured(model, params, tokens[chosen], real[chosen], names, edit or {})
        for row, values in enumerate(zip(*(np.asarray(site)[:count] for site in found), strict=True)):
            keep = real[chosen[row]] if places is None else places[chosen[row]]
            parts.append(tuple(value[keep] for value in values))
    join = np.concatenate if places is None else np.stack
    return {name: join(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def check_prompts(model: Model, tokens: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and the mask bool, both `[prompts, length]` on the host.

    Raises:
        SiteError: there are no prompts, or the shapes differ.
        TokenError: ids beyond the model's vocabulary, or more tokens than it has learned positions.
    """
    tokens = np.asarray(tokens)
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if tokens.ndim != 2 or not tokens.size or real.shape != tokens.shape:
        raise SiteError(
            f"tokens of shape {list(tokens.shape)} and a mask of shape {list(real.shape)} are no prompts; "
            "expected [prompts, length] for both, with at least one prompt."
        )
    # Passes are compiled for the width of the array, in which a row's padding has a place too.
    check_tokens(model, tokens, place="prompts")
    return tokens.astype(np.int32), real


def check_pairs(
    model: Model, source: Any, target: Any, mask: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets of token ids int32 and their common mask bool, all `[prompts, length]` on the host.

    Raises:
        SiteError: the shapes differ.
        TokenError: as `check_prompts`.
    """
    source, real = check_prompts(model, source, mask)
    target, _ = check_prompts(model, target)
    if source.shape != target.shape:
        raise SiteError(
            f"source prompts of shape {list(source.shape)} and target prompts of shape {list(target.shape)} "
            "do not pair up; pad them to one length with corresponding tokens in the same places."
        )
    return source, target, real


def batches(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers `[size]` of one pass after the other, and how many of them are new.

    The last pass is filled up with its first row: all have one shape, and run one compiled program.
    """
    size = min(size, total)
    for start in range(0, total, size):
        rows = np.arange(start, min(start + size, total))
        yield np.concatenate([rows, np.full(size - len(rows), start)]), len(rows)


@partial(jax.jit, static_argnames=("model", "names"))
def _captured(
    model: Model, params: Params, tokens: Array, mask: Array, names: tuple[str, ...], edit: dict[str, Edit]
) -> list[Array]:
    found = model.apply(params, tokens, mask=mask, capture=names, logits=False, edit=edit).captured
    return [found[name].astype(jnp.float32) for name in names]


def _places(real: np.ndarray, position: int) -> np.ndarray:
    """Where the `position`-th real token of each row stands."""
    counts = real.sum(axis=1)
    wanted = np.where(position < 0, counts + position, position)
    bad = np.flatnonzero((wanted < 0) | (wanted >= counts))
    if bad.size:
        raise SiteError(
            f"prompt {bad[0]} has {counts[bad[0]]} tokens, so none at position {position}; give longer "
            "prompts, or another position."
        )
    ranks = np.cumsum(real, axis=1) - 1
    return np.argmax(real & (ranks == wanted[:, None]), axis=1)
