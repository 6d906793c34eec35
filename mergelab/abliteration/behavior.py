"""Refusals, KL divergence and loss, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from mergelab.abliteration.answers import REFUSAL_PHRASES, count_refusals, generate_answers
from mergelab.abliteration.prompts import Prompts
from mergelab.activations.losses import UNEMBEDDED, kl_divergence, summed_loss
from mergelab.activations.passes import TokenBatch, passes
from mergelab.errors import MergelabError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of
from mergelab.models.sites import Edit, as_partials
from mergelab.models.streamed import StreamedParams
from mergelab.text.packing import EvaluationWindows, evaluation_windows
from mergelab.text.tokenizer import Tokenizer

__all__ = [
    "Behavior",
    "FirstTokenPrompts",
    "check_refusal_ids",
    "first_token_logits",
    "first_token_scores",
    "measure_behavior",
    "refusal_score",
    "scores_of_jobs",
    "text_loss",
    "text_windows",
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
    if isinstance(params, StreamedParams):
        job = FirstTokenPrompts(prompts, edit or {}, before)
        return next(scores_of_jobs(model, params, [job], ids, batch=batch))
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


@dataclass(frozen=True)
class FirstTokenPrompts:
    """Prompts whose first answer tokens are scored.

    Attributes:
        prompts: the prompts.
        edit: edits by site.
        before: logits `[n, vocab]` to measure the divergence from; if None it is 0.
    """

    prompts: Prompts
    edit: Mapping[str, Edit] = field(default_factory=dict)
    before: np.ndarray | None = None


def scores_of_jobs(
    model: Model, params: Params, jobs: Sequence[FirstTokenPrompts], ids: np.ndarray, *, batch: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`first_token_scores` of several sets of prompts and edits, whose streamed weights are read once.

    Args:
        model: a decoder.
        params: its parameters, in memory or streamed.
        jobs: what is scored.
        ids: tokens that begin a refusal.
        batch: prompts in one forward pass.
    """
    if not isinstance(params, StreamedParams):
        for job in jobs:
            options: dict[str, Any] = {"edit": job.edit, "before": job.before, "batch": batch}
            yield first_token_scores(model, params, job.prompts, ids, **options)
        return
    parts = [list(job.prompts.batches(batch)) for job in jobs]
    given = [
        TokenBatch(part.tokens, part.mask, job.edit, extra=ids)
        for job, some in zip(jobs, parts, strict=True)
        for part in some
    ]
    found = passes(model, params, given, UNEMBEDDED, keep=_last_token, read=_first_scores)
    for job, some in zip(jobs, parts, strict=True):
        columns: list[list[np.ndarray]] = []
        done = 0
        for part in some:
            score, logits = (np.asarray(value)[: part.real] for value in next(found))
            kl = np.zeros_like(score)
            if job.before is not None:
                kl = np.asarray(_divergence(job.before[done : done + part.real], logits))
            columns.append([score, kl, logits])
            done += part.real
        score, kl, logits = (np.concatenate(column) for column in zip(*columns, strict=True))
        yield score, kl, logits


_divergence = jax.jit(kl_divergence)


def _last_token(value: Array, extra: Any) -> Array:
    return value[:, -1]


def _first_scores(model: Model, params: Params, kept: Mapping[str, Array], ids: Array) -> tuple[Array, Array]:
    logits = logits_of(model, params, kept[UNEMBEDDED])
    return refusal_score(logits, ids), logits


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


@dataclass(frozen=True)
class Behavior:
    """Figures of one model.

    Attributes:
        harmful_refusals: the share of harmful prompts whose answer holds a refusal phrase; None where no
            answers were generated.
        harmless_refusals: the same of harmless prompts.
        harmful_score: mean log-odds that the first token of an answer to a harmful prompt is a refusal token.
        harmless_score: the same of harmless prompts.
        kl: mean KL in nats of the first token of harmless answers, from the unedited model's to this one's.
        loss: cross-entropy on the text, in nats per token; None without a text.
        borderline_refusals: the share of refused prompts among harmless ones that tend to be refused; None
            without such prompts.
        borderline_score: mean log-odds of a refusal token after those.
        unfinished: answers, of all sets, that ended within their reasoning; they do not count as refusals.
    """

    harmful_refusals: float | None
    harmless_refusals: float | None
    harmful_score: float
    harmless_score: float
    kl: float
    loss: float | None
    borderline_refusals: float | None = None
    borderline_score: float | None = None
    unfinished: int = 0

    @property
    def perplexity(self) -> float | None:
        """`exp(loss)`."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


def text_windows(tokens: Sequence[int], separator: int, length: int) -> EvaluationWindows:
    """A text in disjoint windows, of which every token is predicted once."""
    return evaluation_windows([tokens], separator, min(length, len(tokens)), 0)


def text_loss(
    model: Model,
    params: Params,
    windows: EvaluationWindows,
    *,
    edit: Mapping[str, Edit] | None = None,
    batch: int = 4,
) -> float:
    """Cross-entropy of a text's tokens, in nats per token.

    Args:
        model: a decoder.
        params: its parameters.
        windows: the text (`text_windows`).
        edit: functions by site, as in `Model.apply`.
        batch: windows in one forward pass.
    """
    total = summed_loss(model, params, windows.tokens, windows.is_target, edit=edit, batch=batch)
    return total / int(windows.is_target.sum())


def measure_behavior(
    model: Model,
    params: Params,
    harmful: Prompts,
    harmless: Prompts,
    refusal_ids: np.ndarray,
    *,
    borderline: Prompts | None = None,
    edit: Mapping[str, Edit] | None = None,
    before: np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
    phrases: str | Sequence[str] = REFUSAL_PHRASES,
    max_new_tokens: int = 48,
    windows: EvaluationWindows | None = None,
    batch: int = 32,
) -> tuple[Behavior, np.ndarray]:
    """The figures of a model, and its logits after harmless prompts, from which a later call measures KL.

    Args:
        model: a decoder.
        params: its parameters, edited or not.
        harmful: prompts on which nothing was fitted or chosen.
        harmless: the same.
        refusal_ids: tokens that begin a refusal.
        borderline: harmless prompts that tend to be refused, or None.
        edit: functions by site, as in `Model.apply`: `ablate` measures an ablation without editing weights.
        before: the logits that the unedited model gave; None for that model itself.
        tokenizer: generates answers and looks for phrases in them; None to look at first tokens only.
        phrases: what marks an answer as a refusal, several or one.
        max_new_tokens: how much of each answer is generated, greedily.
        windows: a text to predict, or None.
        batch: prompts in one forward pass.
    """
    sets = {"harmful": harmful, "harmless": harmless, "borderline": borderline}
    figures: dict[str, Any] = {"harmful_refusals": None, "harmless_refusals": None}
    unfinished, divergence, logits = 0, np.zeros(1), np.zeros((0, model.config.vocab_size), np.float32)
    for kind, prompts in sets.items():
        if prompts is None:
            continue
        from_logits = before if kind == "harmless" else None
        scores, kl, found = first_token_scores(
            model, params, prompts, refusal_ids, edit=edit, before=from_logits, batch=batch
        )
        figures[f"{kind}_score"] = float(scores.mean())
        if kind == "harmless":
            divergence, logits = kl, found
        if tokenizer is not None:
            answers = generate_answers(
                model, params, tokenizer, prompts, max_new_tokens=max_new_tokens, batch=batch, edit=edit
            )
            counted = count_refusals(tokenizer, prompts, answers, phrases)
            figures[f"{kind}_refusals"] = counted.refused / counted.total
            unfinished += counted.unfinished
    loss = None if windows is None else text_loss(model, params, windows, edit=edit)
    return Behavior(kl=float(divergence.mean()), loss=loss, unfinished=unfinished, **figures), logits
