"""A model run on prompts: what its sites hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergelab.activations.batches import batches, stack_prompts
from mergelab.activations.passes import TokenBatch, in_float32, passes
from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, match_sites
from mergelab.models.token_checks import check_tokens

__all__ = [
    "Patterns",
    "capture",
    "check_pairs",
    "check_prompts",
    "position_columns",
    "stream_sites",
]


Patterns = str | Sequence[str]
"""Names or glob patterns of sites."""

_BY_TOKEN = ("batch", "length")


def stream_sites(model: Model, patterns: Patterns) -> tuple[str, ...]:
    """The sites that patterns select, in forward order; all must have the axes `[batch, length, ...]`.

    Raises:
        SiteError: a pattern selects nothing, or a site whose second axis is not the tokens.
    """
    names = _sites(model, patterns)
    for name in names:
        if model.sites()[name][:2] != _BY_TOKEN:
            raise SiteError(
                f"the site {name!r} has shape {list(model.sites()[name])}, which is not one activation for "
                "each token; take sites of shape [batch, length, ...]."
            )
    return names


def _sites(model: Model, patterns: Patterns) -> tuple[str, ...]:
    """The sites that patterns select, in forward order."""
    wanted = [patterns] if isinstance(patterns, str) else patterns
    found = {name for pattern in wanted for name in match_sites(model.sites(), pattern)}
    return tuple(name for name in model.sites() if name in found)


def capture(
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
        params: its parameters, on any mesh, or streamed.
        tokens: ids of one prompt `[length]`, of prompts `[batch, length]`, or a list of prompts, of which the
            shorter ones are padded on the left.
        sites: names or patterns.
        mask: True for real tokens, `[batch, length]`; all by default, and the padding's own for a list.
        position: the one real token of each prompt to keep (-1: its last); all tokens by default. Takes
            sites of shape `[batch, length, ...]`.
        batch: prompts in one pass.
        edit: edits to run them with.

    Returns:
        Activations by site, in forward order, `[batch, length, width]`, with zeros at padding; sites with
        heads and attention patterns keep their own axes. For one position `[batch, width]`.

    Raises:
        SiteError: the model has no such site, a site has no axis of tokens to take a position of, a prompt
            has no token at the position, or the prompts and the mask differ in shape.
        TokenError: text in place of tokens, ids beyond the model's vocabulary, or more tokens than it has
            learned positions.

    Example:
        >>> import numpy as np
        >>> from mergelab.models import model_from_config
        >>> model = model_from_config({
        ...     "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32,
        ...     "num_hidden_layers": 2, "num_attention_heads": 2,
        ... })
        >>> found = capture(model, model.init(0), [[5, 6, 7], [8, 9]], ["blocks.1.resid_post"])
        >>> found["blocks.1.resid_post"].shape
        (2, 3, 16)
    """
    names = _sites(model, sites) if position is None else stream_sites(model, sites)
    tokens, real = check_prompts(model, tokens, mask)
    places = None if position is None else position_columns(real, position)
    parts: list[list[np.ndarray]] = []
    parts_of = list(batches(len(tokens), batch))
    given = [TokenBatch(tokens[chosen], real[chosen], edit or {}) for chosen, _ in parts_of]
    found = passes(model, params, given, names, keep=in_float32)
    for (chosen, count), sites_of in zip(parts_of, found, strict=True):
        keep = slice(count) if places is None else (np.arange(count), places[chosen[:count]])
        parts.append([np.asarray(sites_of[name])[keep] for name in names])
    arrays = {name: np.concatenate(site) for name, site in zip(names, zip(*parts, strict=True), strict=True)}
    if places is None and not real.all():
        for name, array in arrays.items():
            if model.sites()[name][:2] == _BY_TOKEN:
                array[~real] = 0
    return arrays


def check_prompts(model: Model, tokens: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and the mask bool, both `[prompts, length]` on the host.

    Args:
        model: what will read them.
        tokens: prompts in any form that `stack_prompts` takes.
        mask: True for real tokens.

    Raises:
        SiteError: there are no prompts, or the shapes differ.
        TokenError: text in place of tokens, ids beyond the model's vocabulary, or more tokens than it has
            learned positions.
    """
    tokens, real = stack_prompts(tokens, mask)
    # Passes are compiled for the width of the array, in which a row's padding has a place too.
    check_tokens(model, tokens, place="prompts")
    return tokens.astype(np.int32, copy=False), real


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


def position_columns(real: np.ndarray, position: int) -> np.ndarray:
    """The column of the `position`-th real token of each row, from 0; -1 is the last.

    Raises:
        SiteError: a row has no such token.
    """
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
