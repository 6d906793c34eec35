"""Trains a language model: AdamW, linear warm-up then cosine decay, one compiled step with donated state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

__all__ = ["TrainSettings", "next_token_loss", "train_lm"]

Params = Any
Apply = Callable[[Params, Int[Array, "batch length"]], Float[Array, "batch length vocab"]]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to learn.

    Attributes:
        steps: optimizer steps.
        learning_rate: the peak, reached after `warmup_steps`; the cosine ends at a tenth of it.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        clip_norm: gradients are scaled down to this global norm.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, end_value=0.1 * self.learning_rate
        )
        decay = optax.adamw(schedule, b2=0.95, weight_decay=self.weight_decay, mask=_matrices)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), decay)


def next_token_loss(
    apply: Apply, params: Params, windows: Int[Array, "batch length_plus_1"]
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of every token given those before it in its window."""
    logits = apply(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def train_lm(
    apply: Apply,
    params: Params,
    batches: Iterator[np.ndarray],
    settings: TrainSettings,
    *,
    on_step: Callable[[int, Params], None] | None = None,
) -> tuple[Params, np.ndarray]:
    """Trains `params` on `settings.steps` batches; deterministic given the parameters and the batches.

    Args:
        apply: the model, `(params, tokens) -> logits`; the same object compiles once for equal settings.
        params: start of training, left untouched.
        batches: int32 windows `[batch, length + 1]`.
        settings: schedule and optimizer.
        on_step: called after every step with its number, from 1, and the parameters, which the next step
            overwrites: copy them to keep them.

    Returns:
        The trained parameters and the loss of every step, float32 `[steps]` in nats per token.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)  # a step donates what it is given
    state = settings.optimizer().init(params)
    losses: list[Array] = []
    for number in range(1, settings.steps + 1):
        params, state, loss = _step(params, state, next(batches), apply=apply, settings=settings)
        losses.append(loss)
        if on_step:
            on_step(number, params)
    return params, np.array(jax.device_get(losses), np.float32)


@partial(jax.jit, static_argnames=("apply", "settings"), donate_argnames=("params", "state"))
def _step(
    params: Params,
    state: optax.OptState,
    windows: Int[Array, "batch length_plus_1"],
    *,
    apply: Apply,
    settings: TrainSettings,
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    loss, gradients = jax.value_and_grad(partial(next_token_loss, apply))(params, windows)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer step count
        updates, state = settings.optimizer().update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def _matrices(params: Params) -> Params:
    """True for the leaves that weight decay applies to: all but the norms' scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
