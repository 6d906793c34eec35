"""What a forward pass is scored by: functions from logits to one number for each prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

__all__ = ["LogitMetric", "logit_difference", "token_log_probability", "token_probability"]

LogitMetric = Callable[[Array], Array]
"""`logits [batch, length, vocab] -> [batch]`, jittable.

What it holds for each prompt, such as the right answers, goes in as
`jax.tree_util.Partial(function, *arrays)` with arrays `[prompts, ...]`: they are cut into batches with the
prompts.
"""


def logit_difference(right: Any, wrong: Any, positions: Any = None) -> LogitMetric:
    """The logit of one token less that of another.

    Args:
        right: token ids `[prompts]`.
        wrong: token ids `[prompts]`.
        positions: where each prompt's prediction stands, `[prompts]`; the last place by default.
    """
    right, wrong = jnp.asarray(right, jnp.int32), jnp.asarray(wrong, jnp.int32)
    return Partial(_difference, right, wrong, _places(positions, right))


def token_log_probability(tokens: Any, positions: Any = None) -> LogitMetric:
    """The natural logarithm of the probability of a token; arguments as in `logit_difference`."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return Partial(_log_probability, tokens, _places(positions, tokens))


def token_probability(tokens: Any, positions: Any = None) -> LogitMetric:
    """The probability of a token; arguments as in `logit_difference`."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return Partial(_probability, tokens, _places(positions, tokens))


def _places(positions: Any, like: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(-1 if positions is None else positions, jnp.int32), like.shape)


def _at(logits: Array, positions: Array) -> Array:
    return logits[jnp.arange(logits.shape[0]), positions]


def _pick(values: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0]


def _difference(right: Array, wrong: Array, positions: Array, logits: Array) -> Array:
    row = _at(logits, positions)
    return _pick(row, right) - _pick(row, wrong)


def _log_probability(tokens: Array, positions: Array, logits: Array) -> Array:
    return _pick(jax.nn.log_softmax(_at(logits, positions), axis=-1), tokens)


def _probability(tokens: Array, positions: Array, logits: Array) -> Array:
    return jnp.exp(_log_probability(tokens, positions, logits))
