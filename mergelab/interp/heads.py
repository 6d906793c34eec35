"""Where heads look on text that repeats itself: induction, previous-token and duplicate-token scores.

On random tokens that come twice, `r_1 ... r_n r_1 ... r_n`, nothing but the repetition can be predicted. An
induction head looks from a token of the second half to the one after its first occurrence (Olsson et al.
2022, arXiv:2209.11895).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import batches
from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials
from mergelab.models.token_checks import check_tokens

__all__ = ["HeadScores", "head_scores", "repeated_tokens"]


@dataclass(frozen=True)
class HeadScores:
    """Mean attention from tokens of the second half to one place, from 0 to 1: `[layers, heads]` each.

    Attributes:
        induction: to the token after the same token's first occurrence, `n - 1` back.
        previous: to the token before.
        duplicate: to the same token's first occurrence, `n` back.
        repeated_loss: cross-entropy, in nats, of the tokens of the second half but its first.
    """

    induction: np.ndarray
    previous: np.ndarray
    duplicate: np.ndarray
    repeated_loss: float


def repeated_tokens(
    vocab_size: int, half: int, prompts: int, *, seed: int = 0, first: int | None = None, lowest: int = 0
) -> np.ndarray:
    """Random tokens that come twice: int32 `[prompts, 2 * half]`, with `first` before them one longer.

    Args:
        vocab_size: tokens are drawn uniformly from `lowest` to `vocab_size - 1`, without repetition within a
            half where there are enough of them.
        half: tokens that are repeated.
        prompts: how many rows.
        seed: of the draw.
        first: a token to begin every row with, such as the one that begins a text.
        lowest: the first token that is not special.
    """
    rng = np.random.default_rng(seed)
    choices = np.arange(lowest, vocab_size)
    drawn = np.stack([rng.choice(choices, half, replace=len(choices) < half) for _ in range(prompts)])
    start = np.full((prompts, 0 if first is None else 1), first or 0)
    return np.concatenate([start, drawn, drawn], axis=1).astype(np.int32)


def head_scores(
    model: Model,
    params: Params,
    *,
    half: int = 32,
    prompts: int = 32,
    seed: int = 0,
    first: int | None = None,
    lowest: int = 0,
    batch: int = 8,
    edit: Mapping[str, Edit] | None = None,
) -> HeadScores:
    """Runs a decoder on repeated random tokens.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        half: as in `repeated_tokens`, like `prompts`, `seed`, `first` and `lowest`.
        prompts: see `half`.
        seed: see `half`.
        first: see `half`.
        lowest: see `half`.
        batch: prompts in one pass; the patterns of all layers are held for so many.
        edit: edits to run it with.

    Raises:
        SiteError: the model is an encoder, or has too few positions.
        TokenError: `first` is none of its tokens.
    """
    c = model.config
    if not model.family.architecture.causal or 2 * half + (first is not None) > c.max_length or half < 2:
        raise SiteError(
            f"{half} tokens that come twice do not fit a {model.family.model_type!r} model with "
            f"{c.max_length} positions; take a decoder, and halves of 2 tokens or more that fit it."
        )
    tokens = repeated_tokens(c.vocab_size, half, prompts, seed=seed, first=first, lowest=lowest)
    check_tokens(model, tokens, place="the first token and those drawn")
    total, loss = np.zeros((3, c.layers, c.heads)), 0.0
    for rows, count in batches(prompts, batch):
        scores, losses = _scores(model, params, tokens[rows], as_partials(edit), half)
        total += np.asarray(scores, np.float64)[:count].sum(axis=0)
        loss += float(np.asarray(losses, np.float64)[:count].sum())
    induction, previous, duplicate = total / prompts
    return HeadScores(induction, previous, duplicate, loss / prompts)


@partial(jax.jit, static_argnames=("model", "half"))
def _scores(
    model: Model, params: Params, tokens: Array, edit: Mapping[str, Edit], half: int
) -> tuple[Array, Array]:
    """`[batch, 3, layers, heads]` and the loss `[batch]`."""
    out = model.apply(params, tokens, capture=["blocks.*.attn.pattern"], edit=edit)
    assert out.logits is not None
    patterns = jnp.stack(list(out.captured.values()), axis=1)  # [batch, layers, heads, query, key]
    queries = jnp.arange(tokens.shape[1] - half, tokens.shape[1])
    scores = jnp.stack(
        [patterns[..., queries, queries - back].mean(axis=-1) for back in (half - 1, 1, half)], axis=1
    )
    logp = jax.nn.log_softmax(out.logits[:, -half:-1])
    losses = -jnp.take_along_axis(logp, tokens[:, -half + 1 :, None], axis=-1)[..., 0].mean(axis=1)
    return scores, losses
