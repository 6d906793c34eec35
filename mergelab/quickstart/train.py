"""Trains a small language model from windows of tokens, by the step that fine-tunes (`mergelab.tuning`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mergelab.models.model import Params
from mergelab.tuning.objective import WindowLoss
from mergelab.tuning.optimizers import Optimizer
from mergelab.tuning.steps import begin, train_step

__all__ = ["TrainSettings", "next_token_loss", "train_lm"]

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

    def optimizer(self) -> Optimizer:
        """AdamW by these settings."""
        return Optimizer(
            self.steps, self.learning_rate, self.warmup_steps, self.weight_decay, self.clip_norm, beta2=0.95
        )


def next_token_loss(
    apply: Apply, params: Params, windows: Int[Array, "batch length_plus_1"]
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of every token given those before it in its window."""
    _, nats, _, targets = WindowLoss(apply)(params, {}, windows)
    return nats / targets


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
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)  # a step uses up what it is given
    loss, optimizer = WindowLoss(apply), settings.optimizer()
    state = begin(params, optimizer)
    losses: list[Array] = []
    for number in range(1, settings.steps + 1):
        state, figures = train_step(state, {}, next(batches)[None], loss=loss, optimizer=optimizer)
        losses.append(figures.loss)
        if on_step:
            on_step(number, state.trained)
    return state.trained, np.array(jax.device_get(losses), np.float32)
