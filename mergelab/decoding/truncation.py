"""Transforms that reshape the next-token distribution: temperature, top-k, top-p, min-p.

Of tokens whose logits are exactly equal, a truncation keeps all or none: the result does not depend on how a
vocabulary is ordered.
"""

from __future__ import annotations

from dataclasses import field

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mergelab.decoding.transform import History, per_row, require, transform

__all__ = ["MinP", "Temperature", "TopK", "TopP"]

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
class TopK:
    """Keeps the `k` largest logits (Fan et al., arXiv:1805.04833), and what ties with the last of them.

    Attributes:
        k: at least 1, static; a `k` above the vocabulary's size keeps everything.
    """

    k: int = field(metadata={"static": True})

    def __post_init__(self) -> None:
        require("TopK", self.k, isinstance(self.k, int) and self.k >= 1, "an integer of at least 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        # Without the barrier XLA's CPU backend sorts whole rows when only the last value is used.
        values, _ = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(self.k, logits.shape[-1])))
        return _keep(logits, logits >= values[:, -1:])


@transform
class TopP:
    """Nucleus: keeps the fewest likeliest tokens whose probabilities reach `p` (Holtzman et al., 1904.09751).

    The likeliest token is always kept.

    Attributes:
        p: in (0, 1]; a scalar, or float `[batch]` with one value per row. 1 keeps every possible token.
    """

    p: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.p, int | float):
            require("TopP", self.p, 0 < self.p <= 1, "a probability above 0 and at most 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        ascending = jnp.sort(logits, axis=-1)
        # Summed from the small end, where a sum from the large one would round the tail away.
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        kept = (below > 1.0 - per_row(self.p)).at[:, -1].set(True)
        smallest = jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)
        return _keep(logits, logits >= smallest)


@transform
class MinP:
    """Keeps tokens at least `p` times as likely as the likeliest one (Nguyen et al., arXiv:2407.01082).

    Attributes:
        p: in [0, 1]; a scalar, or float `[batch]` with one value per row. 0 keeps everything.
    """

    p: ArrayLike

    def __post_init__(self) -> None:
        if isinstance(self.p, int | float):
            require("MinP", self.p, 0 <= self.p <= 1, "a ratio of probabilities from 0 to 1")

    def __call__(self, logits: Logits, history: History) -> Logits:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        return _keep(logits, logits >= largest + jnp.log(per_row(self.p)))


def _keep(logits: Logits, kept: Array) -> Logits:
    return jnp.where(kept, logits, -jnp.inf)
