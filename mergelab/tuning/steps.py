"""One step of an optimizer: gradients of several passes, summed and divided by the targets they have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mergelab.tuning.objective import Sums
from mergelab.tuning.optimizers import Optimizer

__all__ = ["Figures", "StepState", "begin", "compile_step", "train_step"]

Loss = Callable[[Any, Any, Any], Sums]


class StepState(NamedTuple):
    """What a step changes.

    Attributes:
        trained: parameters or factors, float32.
        moments: the optimizer's state.
    """

    trained: Any
    moments: Any


class Figures(NamedTuple):
    """Figures of one step, float32 scalars.

    Attributes:
        loss: what is minimized, in nats a target.
        cross_entropy: its first part.
        kl: mean KL divergence from the teacher; 0 without one.
        gradient_norm: global norm of the gradient, before it is clipped.
        targets: number of targets.
    """

    loss: Array
    cross_entropy: Array
    kl: Array
    gradient_norm: Array
    targets: Array


def begin(trained: Any, optimizer: Optimizer) -> StepState:
    """The state before the first step; its arrays lie as those that are trained do."""
    return StepState(trained, optimizer.build().init(trained))


def _step(
    state: StepState, fixed: Any, batches: Any, *, loss: Loss, optimizer: Optimizer
) -> tuple[StepState, Figures]:
    """One step.

    Args:
        state: what is changed.
        fixed: what `loss` reads beside it.
        batches: what `loss` is given, with an axis of passes before all others.
        loss: sums over the targets of one pass.
        optimizer: how gradients become a change.
    """

    def summed(trained: Any, batch: Any) -> tuple[Array, Sums]:
        sums = loss(trained, fixed, batch)
        return sums[0], sums

    gradient = jax.value_and_grad(summed, has_aux=True)

    def add(before: tuple[Sums, Any], batch: Any) -> tuple[tuple[Sums, Any], None]:
        (_, sums), found = gradient(state.trained, batch)
        return jax.tree.map(jnp.add, before, (sums, found)), None

    first = jax.tree.map(lambda x: x[0], batches)
    (_, sums), total = gradient(state.trained, first)
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        rest = jax.tree.map(lambda x: x[1:], batches)
        (sums, total), _ = jax.lax.scan(add, (sums, total), rest)
    targets = jnp.maximum(sums[3], 1)
    total = jax.tree.map(lambda x: x / targets.astype(x.dtype), total)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer step count
        updates, moments = optimizer.build().update(total, state.moments, state.trained)
    means = Figures(sums[0] / targets, sums[1] / targets, sums[2] / targets, optax.tree.norm(total), sums[3])
    return StepState(optax.apply_updates(state.trained, updates), moments), means


train_step = partial(jax.jit, static_argnames=("loss", "optimizer"), donate_argnames=("state",))(_step)
"""`_step`, compiled once for equal losses, optimizers and shapes; the state that it is given is used up."""


def compile_step(state: StepState, fixed: Any, batches: Any, *, loss: Loss, optimizer: Optimizer) -> Any:
    """The compiled step, which knows what memory it takes; on a mesh it leaves the state as it lies."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    one = all(len(sharding.device_set) == 1 for sharding in jax.tree.leaves(shardings))
    if one:
        return train_step.lower(state, fixed, batches, loss=loss, optimizer=optimizer).compile()
    step = jax.jit(
        partial(_step, loss=loss, optimizer=optimizer), donate_argnums=0, out_shardings=(shardings, None)
    )
    return step.lower(state, fixed, batches).compile()
