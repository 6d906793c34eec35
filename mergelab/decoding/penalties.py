"""Transforms that favour or forbid particular tokens: repetition penalty, logit bias, suppression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mergelab.decoding.transform import History, per_row, require, transform

__all__ = ["LogitBias", "MinNewTokens", "RepetitionPenalty", "Suppress", "logit_bias", "suppress"]

Logits = Float[Array, "batch vocab"]


@transform
class RepetitionPenalty:
    """Divides positive logits of tokens the row already holds by `penalty`, multiplies negative ones by it.

    From CTRL (Keskar et al., arXiv:1909.05858), in the form that never raises a logit. Padding is not held
    against a row.

    Attributes:
        penalty: positive, 1 changes nothing; a scalar, or float `[batch]` with one value per row.
    """

    penalty: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.penalty, int | float):
            require("RepetitionPenalty", self.penalty, 0 < self.penalty < float("inf"), "a positive number")

    def __call__(self, logits: Logits, history: History) -> Logits:
        penalty = per_row(self.penalty)
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(history.seen, penalised, logits)


@transform
class LogitBias:
    """Adds a constant to the logits of some tokens; build it with `logit_bias`.

    Attributes:
        ids: int32 `[biased]`, distinct.
        bias: float32 `[biased]`; `-inf` forbids a token.
    """

    ids: ArrayLike
    bias: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        bias = jnp.broadcast_to(jnp.asarray(self.bias, logits.dtype), (logits.shape[0], *np.shape(self.bias)))
        return logits.at[:, self.ids].add(bias)


@transform
class Suppress:
    """Forbids some tokens; build it with `suppress`.

    Attributes:
        ids: int32 `[suppressed]`.
    """

    ids: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        return logits.at[:, self.ids].set(-jnp.inf)


@transform
class MinNewTokens:
    """Forbids the tokens `ids` (those that end a text) until a row has generated `count` tokens.

    Attributes:
        count: int32 scalar or `[batch]`.
        ids: int32 `[ends]`.
    """

    count: ArrayLike
    ids: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        early = history.generated < jnp.asarray(self.count, jnp.int32).reshape(-1)
        return jnp.where(early[:, None], logits.at[:, self.ids].set(-jnp.inf), logits)


def logit_bias(bias: Mapping[int, float]) -> LogitBias:
    """Adds `bias[id]` to the logit of token `id`; an id outside the vocabulary has no effect.

    Raises:
        DecodingError: an id is negative, or a bias is NaN or +infinity.
    """
    for token, value in bias.items():
        require("logit_bias", {token: value}, token >= 0, "token ids of at least 0")
        require("logit_bias", {token: value}, value < float("inf"), "finite biases, or -inf to forbid")
    return LogitBias(np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32))


def suppress(ids: Iterable[int]) -> Suppress:
    """Forbids the tokens `ids`; an id outside the vocabulary has no effect.

    Raises:
        DecodingError: an id is negative.
    """
    ids = tuple(ids)
    require("suppress", ids, all(token >= 0 for token in ids), "token ids of at least 0")
    return Suppress(np.array(ids, np.int32))
