"""How strongly a model refuses, and how far an edit moves it: figures of the first token of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from mergelab.errors import MergelabError
from mergelab.interp.abliteration.prompts import Prompts
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials

__all__ = [
    "check_refusal_ids",
    "first_token_logits",
    "first_token_scores",
    "kl_divergence",
    "refusal_score",
]


def check_refusal_ids(model: Model, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The ids as int32, each once.

    Raises:
        MergelabError: there are none, one is not in the vocabulary, or all of it is named.
    """
    found = np.unique(np.asarray(ids, np.int64))
    vocab = model.config.vocab_size
    if not found.size or found[0] < 0 or found[-1] >= vocab or found.size == vocab:
        raise MergelabError(
            f"the refusal tokens are {list(ids)[:8]}; expected some, but not all, of the ids below {vocab}."
        )
    return found.astype(np.int32)


def refusal_score(
    logits: Float[Array, "batch vocab"], ids: Int[Array, " refusals"]
) -> Float[Array, " batch"]:
    """Log-odds that the next token is one of `ids`: `log p - log(1 - p)` (arXiv:2406.11717, section 2.3)."""
    logits = logits.astype(jnp.float32)
    refuses = jnp.zeros(logits.shape[-1], jnp.bool_).at[ids].set(True)[None]
    low = jnp.finfo(jnp.float32).min
    yes, no = (jax.nn.logsumexp(jnp.where(where, logits, low), axis=-1) for where in (refuses, ~refuses))
    return yes - no


def kl_divergence(
    before: Float[Array, "batch vocab"], after: Float[Array, "batch vocab"]
) -> Float[Array, " batch"]:
    """`KL(before || after)` of the distributions that logits mean, in nats."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (before, after))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def first_token_logits(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    edit: Mapping[str, Edit] | None = None,
) -> Float[Array, "batch vocab"]:
    """Logits after each prompt's last token; those of earlier tokens, often gigabytes, are never computed."""
    batch, length = tokens.shape
    cache = model.new_cache(batch, length, params["embed"]["embedding"].dtype)
    if length > 1:
        out = model.apply(params, tokens[:, :-1], mask=mask[:, :-1], cache=cache, edit=edit, logits=False)
        assert out.cache is not None
        cache = out.cache
    logits = model.apply(params, tokens[:, -1:], cache=cache, edit=edit).logits
    assert logits is not None
    return logits[:, 0]


def first_token_scores(
    model: Model,
    params: Params,
    prompts: Prompts,
    ids: np.ndarray,
    *,
    edit: Mapping[str, Edit] | None = None,
    before: np.ndarray | None = None,
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Refusal score, divergence and logits of every prompt.

    Args:
        model: a decoder.
        params: its parameters.
        prompts: the prompts.
        ids: tokens that begin a refusal.
        edit: edits by site; compiled once for each set of sites.
        before: logits `[n, vocab]` to measure the divergence from; if None it is 0.
        batch: prompts in one forward pass.

    Returns:
        Log-odds of refusal `[n]`; KL in nats `[n]`; logits `[n, vocab]`; all float32.
    """
    found: list[list[np.ndarray]] = []
    done = 0
    nothing = np.zeros((min(batch, len(prompts)), model.config.vocab_size), np.float32)
    for part in prompts.batches(batch):
        rows = np.minimum(np.arange(done, done + len(part.tokens)), len(prompts) - 1)
        reference = nothing if before is None else before[rows]
        values = _scores(model, params, part.tokens, part.mask, ids, reference, as_partials(edit))
        found.append([np.asarray(value)[: part.real] for value in values])
        done += part.real
    score, kl, logits = (np.concatenate(column) for column in zip(*found, strict=True))
    return score, kl if before is not None else np.zeros_like(kl), logits


@partial(jax.jit, static_argnames="model")
def _scores(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    ids: Int[Array, " refusals"],
    before: Float[Array, "batch vocab"],
    edit: Mapping[str, Partial],
) -> tuple[Array, Array, Array]:
    logits = first_token_logits(model, params, tokens, mask, edit)
    return refusal_score(logits, ids), kl_divergence(before, logits), logits
