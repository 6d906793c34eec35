"""What weights alone say of chosen tokens: bigrams, the direct path, analogies, and sums of other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import TokenError
from mergelab.interp.vectors import unit
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import readout, unembedding
from mergelab.reasoning.decision_pair import DecisionPair, LoadedModel, next_log_probs
from mergelab.sae.evaluation.sparse_coding import orthogonal_matching_pursuit

__all__ = [
    "Analogy",
    "PathTable",
    "TokenSum",
    "direct_path",
    "read_analogies",
    "read_paths",
    "sparse_token_sum",
    "token_analogy",
]


@dataclass(frozen=True)
class PathTable:
    """What tokens say of the next one by themselves, in both models, as log-probabilities in nats.

    Attributes:
        tokens: ids of the tokens.
        direct: float32 `[models, tokens, chosen]`: of the direct path, embedding to logits without a block.
        bigram: the same of the whole model on that token alone, behind what begins a text.
        likeliest: int32 `[models, 2, tokens]`, what both put first.
    """

    tokens: tuple[int, ...]
    direct: np.ndarray
    bigram: np.ndarray
    likeliest: np.ndarray


def read_paths(pair: DecisionPair, tokens: Sequence[int]) -> PathTable:
    """Bigrams and direct paths from some tokens, such as those an answer may end in, to the chosen ones."""
    begins = pair.tokenizer.id_of("bos")
    rows = [[token] if begins is None or token == begins else [begins, token] for token in tokens]
    found = []
    for loaded in pair.models:
        direct = np.asarray(direct_path(*loaded, jnp.asarray(tokens, jnp.int32)))
        found.append(np.stack([direct, next_log_probs(loaded, rows)]))
    both = np.stack(found)  # [models, kinds, tokens, vocab]
    chosen = both[..., pair.ids]
    likeliest = both.argmax(axis=-1).astype(np.int32)
    return PathTable(tuple(tokens), chosen[:, 0], chosen[:, 1], likeliest)


@partial(jax.jit, static_argnames="model")
def direct_path(model: Model, params: Params, tokens: Any) -> Array:
    """Log-probabilities of the next token read off a token's embedding, float32 `[tokens, vocab]`."""
    ids = jnp.asarray(tokens, jnp.int32)[:, None]
    stream = model.apply(params, ids, capture="embed", logits=False).captured["embed"][:, 0]
    return jax.nn.log_softmax(readout(model, params, stream), axis=-1)


@dataclass(frozen=True)
class Analogy:
    """`a - b + c`, and the tokens nearest to it.

    Attributes:
        terms: texts of a, b and c.
        nearest: ids of the nearest tokens in each model, the terms left out, `[models, k]`.
        cosines: float32 `[models, k]`.
        random: cosine of the nearest token to a random direction: control, `[models]`.
    """

    terms: tuple[str, str, str]
    nearest: np.ndarray
    cosines: np.ndarray
    random: np.ndarray


def read_analogies(
    pair: DecisionPair, terms: Sequence[tuple[int, int, int]], *, k: int = 5, seed: int = 0
) -> list[Analogy]:
    """The nearest tokens to `a - b + c` in both models, beside a random direction."""
    found = []
    for a, b, c in terms:
        each = [token_analogy(loaded, [a, c], [b], k=k) for loaded in pair.models]
        control = []
        for model, params in pair.models:
            drawn = jax.random.normal(jax.random.key(seed), (model.config.d_model,))
            rows = unit(jnp.asarray(unembedding(model, params), jnp.float32).T)
            control.append(float((rows @ unit(drawn[None])[0]).max()))
        found.append(
            Analogy(
                (pair.shown(a), pair.shown(b), pair.shown(c)),
                np.stack([ids for ids, _ in each]),
                np.stack([cosines for _, cosines in each]),
                np.array(control, np.float32),
            )
        )
    return found


def token_analogy(
    loaded: LoadedModel, plus: Sequence[int], minus: Sequence[int], *, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens nearest to a sum of output embeddings of unit length, less others.

    Args:
        loaded: a decoder and its parameters.
        plus: ids of tokens that are added.
        minus: ids of tokens that are subtracted.
        k: number of tokens to find; those of the sum are left out.

    Returns:
        Ids int32 `[k]`, the nearest first, and their cosines.

    Raises:
        TokenError: an id is beyond the vocabulary.
    """
    model, params = loaded
    terms = [*plus, *minus]
    if not plus or any(not 0 <= token < model.config.vocab_size for token in terms):
        raise TokenError(f"tokens {terms} cannot be added up; give ids below {model.config.vocab_size:,}.")
    rows = unit(jnp.asarray(unembedding(model, params), jnp.float32).T)
    sign = np.array([1.0] * len(plus) + [-1.0] * len(minus), np.float32)
    wanted = jnp.einsum("t,tw->w", sign, rows[np.array(terms)], precision="highest")
    cosines = np.array(rows @ unit(wanted[None])[0])
    cosines[terms] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:k]
    return best.astype(np.int32), cosines[best]


@dataclass(frozen=True)
class TokenSum:
    """A token's output embedding as a sum of a few others'.

    Attributes:
        token: its id.
        terms: ids of the others, the largest weight first.
        weights: float32, of each.
        explained: fraction of its squared length that the sum explains.
        random: control: the same fraction for a random direction and as many terms.
        others: control: the same for other tokens, drawn at random, mean.
    """

    token: int
    terms: tuple[int, ...]
    weights: tuple[float, ...]
    explained: float
    random: float
    others: float


def sparse_token_sum(
    loaded: LoadedModel, token: int, *, k: int = 8, draws: int = 4, seed: int = 0
) -> TokenSum:
    """Writes a token's output embedding as a sum of `k` others', by orthogonal matching pursuit.

    The embeddings are taken less their mean, which all tokens share.

    Args:
        loaded: a decoder and its parameters.
        token: id of the token.
        k: number of terms.
        draws: number of random directions, and of other tokens, that are tried beside it.
        seed: seed of them.
    """
    model, params = loaded
    rows = jnp.asarray(unembedding(model, params), jnp.float32).T
    rows = rows - rows.mean(axis=0, keepdims=True)
    rng = np.random.default_rng(seed)
    others = rng.choice(np.delete(np.arange(len(rows)), token), size=draws, replace=False)
    found = [_sum_of(rows, int(one), k) for one in (token, *others.tolist())]
    noise = jnp.asarray(rng.normal(size=(draws, rows.shape[1])), jnp.float32)
    codes = orthogonal_matching_pursuit(noise, rows, k)
    random = float(_explained(noise, codes, rows).mean())
    codes, share = found[0]
    terms = np.argsort(-np.abs(codes), kind="stable")[:k]
    return TokenSum(
        token,
        tuple(terms.tolist()),
        tuple(codes[terms].tolist()),
        share,
        random,
        float(np.mean([share for _, share in found[1:]])),
    )


def _sum_of(rows: Array, token: int, k: int) -> tuple[np.ndarray, float]:
    """Codes `[vocab]` of a token over all others, and what they explain."""
    # Its own atom becomes one that no residual has a large cosine with: another token's, once more.
    atoms = rows.at[token].set(rows[(token + 1) % len(rows)])
    wanted = rows[token][None]
    codes = orthogonal_matching_pursuit(wanted, atoms, k)
    share = float(_explained(wanted, codes, atoms)[0])
    found = np.array(codes[0])
    found[(token + 1) % len(rows)] += found[token]
    found[token] = 0.0
    return found, share


def _explained(wanted: Array, codes: Array, atoms: Array) -> Array:
    left = wanted - jnp.matmul(codes, atoms, precision="highest")
    return 1 - jnp.square(left).sum(axis=-1) / jnp.square(wanted).sum(axis=-1)
