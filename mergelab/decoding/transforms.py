"""Pure maps of logits: temperature, truncation (top-k, top-p, min-p), penalties and bans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mergelab.compat import register_dataclass
from mergelab.errors import DecodingError

__all__ = [
    "Chain",
    "History",
    "LogitBias",
    "LogitsTransform",
    "MinNewTokens",
    "MinPFilter",
    "RepetitionPenalty",
    "Suppress",
    "Temperature",
    "TopKFilter",
    "TopPFilter",
    "chain",
    "logit_bias",
    "per_row",
    "require",
    "suppress",
    "transform",
]


T = TypeVar("T")


class History(NamedTuple):
    """What a transform may know besides the logits.

    Attributes:
        seen: bool `[batch, vocab]`, True for tokens of the row's prompt (padding not counted) and output.
        generated: int32 `[batch]`, tokens generated in the row so far.
        captured: the sites that `generate(capture=...)` names, of the pass that gave these logits, each
            `[batch, ...]`.
        tokens: int32 `[batch, capacity]`, what the row generated, the first `generated` of them; None where a
            transform is called without.
    """

    seen: Bool[Array, "batch vocab"]
    generated: Int[Array, " batch"]
    captured: Mapping[str, Array] = {}  # nobody adds to it
    tokens: Int[Array, "batch capacity"] | None = None


class LogitsTransform(Protocol):
    """Maps float32 logits `[batch, vocab]`; a token given `-inf` is never chosen."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History
    ) -> Float[Array, "batch vocab"]: ...


@dataclass_transform(frozen_default=True)
def transform(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is also a pytree.

    Fields are leaves, so another temperature needs no new compilation, unless declared with
    `dataclasses.field(metadata={"static": True})`.
    """
    return register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@transform
class Chain:
    """Transforms applied one after the other, the first one first."""

    transforms: tuple[LogitsTransform, ...] = ()

    def __call__(self, logits: Float[Array, "batch vocab"], history: History) -> Float[Array, "batch vocab"]:
        for step in self.transforms:
            logits = step(logits, history)
        return logits


def chain(*transforms: LogitsTransform) -> Chain:
    """Composes transforms from left to right; without any, the identity.

    Order matters: `chain(Temperature(0.5), TopPFilter(0.9))` keeps the tokens that hold 0.9 of the sharpened
    distribution.
    """
    return Chain(tuple(transforms))


def per_row(value: ArrayLike) -> Float[Array, "rows 1"]:
    """A scalar, or one value per row, as a column that broadcasts over the vocabulary."""
    return jnp.asarray(value, jnp.float32).reshape(-1, 1)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuses a hyper-parameter out of its range.

    Raises:
        DecodingError: `holds` is False.
    """
    if not holds:
        raise DecodingError(f"{name} was given {value!r}, but needs {expected}.")


Logits = Float[Array, "batch vocab"]


@transform
class Temperature:
    """`logits / temperature`: below 1 sharpens the distribution, above 1 flattens it.

    Attributes:
        temperature: positive; a scalar, or float `[batch]` with one value per row.
    """

    temperature: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float):
            expected = "a positive number (choose the likeliest token with greedy() instead of 0)"
            require("Temperature", self.temperature, 0 < self.temperature < float("inf"), expected)

    def __call__(self, logits: Logits, history: History) -> Logits:
        return logits / per_row(self.temperature)


@transform
class TopKFilter:
    """Keeps the `k` largest logits (Fan et al., arXiv:1805.04833), and what ties with the last of them.

    Attributes:
        k: number of tokens to keep, at least 1, static; a `k` above the vocabulary's size keeps everything.
    """

    k: int = field(metadata={"static": True})

    def __post_init__(self) -> None:
        require("TopKFilter", self.k, isinstance(self.k, int) and self.k >= 1, "an integer of at least 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        # Without the barrier XLA's CPU backend sorts whole rows when only the last value is used.
        values, _ = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(self.k, logits.shape[-1])))
        return _keep(logits, logits >= values[:, -1:])


@transform
class TopPFilter:
    """Nucleus: keeps the fewest likeliest tokens whose probabilities reach `p` (Holtzman et al., 1904.09751).

    The likeliest token is always kept.

    Attributes:
        p: probability mass to keep, in (0, 1]; a scalar, or float `[batch]` with one value per row. 1 keeps
            every possible token.
    """

    p: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.p, int | float):
            require("TopPFilter", self.p, 0 < self.p <= 1, "a probability above 0 and at most 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        ascending = jnp.sort(logits, axis=-1)
        # Summed from the small end, where a sum from the large one would round the tail away.
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        kept = (below > 1.0 - per_row(self.p)).at[:, -1].set(True)
        smallest = jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)
        return _keep(logits, logits >= smallest)


@transform
class MinPFilter:
    """Keeps tokens at least `p` times as likely as the likeliest one (Nguyen et al., arXiv:2407.01082).

    Attributes:
        p: smallest probability relative to the largest, in [0, 1]; a scalar, or float `[batch]` with one
            value per row. 0 keeps everything.
    """

    p: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.p, int | float):
            require("MinPFilter", self.p, 0 <= self.p <= 1, "a ratio of probabilities from 0 to 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        return _keep(logits, logits >= largest + jnp.log(per_row(self.p)))


def _keep(logits: Logits, kept: Array) -> Logits:
    return jnp.where(kept, logits, -jnp.inf)


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
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(history.seen, penalized, logits)


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
