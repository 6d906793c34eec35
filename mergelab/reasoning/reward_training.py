"""A reward model trained on labels of outcomes or steps, or on pairs: optax, on one device or a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mergelab.activations.batches import filled_batches
from mergelab.errors import TuningError
from mergelab.models.model import Params
from mergelab.reasoning.preferences import bradley_terry_loss
from mergelab.reasoning.reward_model import RewardModel, last_columns
from mergelab.reasoning.reward_rows import RewardRows, require_rows
from mergelab.sharding import named_sharding
from mergelab.tuning.objective import Sums
from mergelab.tuning.optimizers import Optimizer
from mergelab.tuning.steps import begin, compile_step
from mergelab.tuning.training import check_batch, mesh_of, on_mesh

__all__ = ["RewardRecord", "train_reward_model"]

Progress = Callable[[int, int, Mapping[str, float]], object]


@dataclass
class RewardRecord:
    """What happened.

    Attributes:
        steps: `step`, `loss` (nats a label or pair) and `gradient_norm` of each step.
        held_out: `step`, `loss` and `accuracy` before and after, where rows were held out.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _RewardLoss:
    """Sums over the labels, or the pairs, of a batch; hashable.

    Attributes:
        reward: the reward model.
        pairs: whether rows are pairs.
        dtypes: dtype of each trained leaf in the forward pass; float32 if None.
    """

    reward: RewardModel
    pairs: bool
    dtypes: tuple[str, ...] | None

    def __call__(self, trained: Any, fixed: Any, batch: tuple[Array, Array, Array, Array]) -> Sums:
        tokens, mask, targets, counted = batch
        if self.dtypes is not None:
            leaves, tree = jax.tree.flatten(trained)
            trained = tree.unflatten([leaf.astype(d) for leaf, d in zip(leaves, self.dtypes, strict=True)])
        params = {**fixed, **trained}
        if self.pairs:
            # What fills up a batch has no real token, and is no pair.
            here = mask.any(axis=(1, 2))
            flat = tokens.reshape(-1, tokens.shape[2]), mask.reshape(-1, mask.shape[2])
            both = self.reward.log_odds(self.reward.apply(params, *flat)).reshape(-1, 2)
            nats, hit = bradley_terry_loss(both[:, 0], both[:, 1]), both[:, 0] > both[:, 1]
        elif self.reward.kind == "outcome":
            last = last_columns(mask)[:, None]
            here = jnp.take_along_axis(counted, last, axis=1)[:, 0]
            wanted = jnp.take_along_axis(targets, last, axis=1)[:, 0]
            nats, hit = _label_losses(self.reward.apply(params, tokens, mask), wanted)
        else:
            here = counted
            nats, hit = _label_losses(self.reward.apply(params, tokens, mask), targets)
        zero = jnp.zeros((), jnp.float32)
        total = jnp.where(here, nats, zero).sum()
        # The third sum is of divergences elsewhere; here of what was told right.
        return total, total, (here & hit).sum(dtype=jnp.float32), here.sum(dtype=jnp.float32)


def _label_losses(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropies, and hits, of `[..., labels]`; one output is a logit of the label 1."""
    if outputs.shape[-1] == 1:
        score = outputs[..., 0]
        return optax.sigmoid_binary_cross_entropy(score, targets.astype(jnp.float32)), (score > 0) == (
            targets > 0
        )
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return nats, jnp.argmax(outputs, axis=-1) == targets


def train_reward_model(
    reward: RewardModel,
    params: Params,
    rows: RewardRows,
    *,
    held_out: RewardRows | None = None,
    steps: int = 200,
    batch: int = 32,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    head_only: bool = False,
    seed: int = 0,
    progress: Progress = lambda done, total, figures: None,
) -> tuple[Params, RewardRecord]:
    """Trains a reward model by AdamW on labels (cross-entropy) or on pairs (Bradley and Terry's loss).

    What is trained is float32, the forward pass has the dtypes of the parameters. On a mesh
    (`load_reward_model(mesh=...)`) rows are shared over `data` and `fsdp`.

    Args:
        reward: the reward model.
        params: its parameters, left as they are.
        rows: what is learned; of one label the targets are 0 and 1.
        held_out: rows that are judged before and after.
        steps: number of steps.
        batch: rows in a step; they are drawn anew for each epoch.
        learning_rate: peak of the learning rate, which falls by a cosine.
        warmup: fraction of the steps in which it rises.
        weight_decay: AdamW's, on matrices.
        head_only: train the head alone: a probe of what the model knows already.
        seed: seed of the order of rows.
        progress: function that is called with steps done, steps in all, and the figures of a step.

    Returns:
        The parameters, in the dtypes of before, and what happened.

    Raises:
        TuningError: labels do not fit the head or the rows its kind, or a loss is not finite.
        MeshError: the devices cannot share a batch.
    """
    for given in (rows, held_out) if held_out is not None else (rows,):
        _check_rows(reward, given, steps, batch)
    mesh = mesh_of(params["model"])
    check_batch(mesh, batch)
    params = on_mesh(params, mesh)
    names = ("head",) if head_only else ("model", "head")
    part = {name: params[name] for name in names}
    fixed = {name: tree for name, tree in params.items() if name not in names}
    kinds = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(part))
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), part)
    objective = _RewardLoss(reward, rows.pairs, None if set(kinds) == {"float32"} else kinds)
    optimizer = Optimizer(steps, learning_rate, min(round(warmup * steps), steps - 1), weight_decay)
    state, record = on_mesh(begin(trained, optimizer), mesh), RewardRecord()

    def put(arrays: tuple[np.ndarray, ...], before: tuple[None, ...]) -> Any:
        if mesh is None:
            return tuple(map(jnp.asarray, arrays))
        axes = [(*before, "batch", *(None,) * (x.ndim - len(before) - 1)) for x in arrays]
        return tuple(
            jax.device_put(x, named_sharding(mesh, x.shape, names))
            for x, names in zip(arrays, axes, strict=True)
        )

    def judge(step: int, trained: Any) -> None:
        if held_out is None:
            return
        sums = np.zeros(4)
        for arrays, _ in filled_batches(batch, *_arrays(held_out)):
            sums += [float(x) for x in _judged(trained, fixed, put(arrays, ()), loss=objective)]
        loss, accuracy = float(sums[0] / sums[3]), float(sums[2] / sums[3])
        record.held_out.append({"step": step, "loss": loss, "accuracy": accuracy})

    def taken(step: int) -> Any:
        chosen = _rows_of(step, len(rows.tokens), batch, seed)
        return put(tuple(x[chosen][None] for x in _arrays(rows)), (None,))

    compiled = compile_step(state, fixed, taken(0), loss=objective, optimizer=optimizer)
    judge(0, state.trained)
    for number in range(1, steps + 1):
        state, figures = compiled(state, fixed, taken(number - 1))
        line = {"step": number, "loss": float(figures.loss), "gradient_norm": float(figures.gradient_norm)}
        if not np.isfinite(line["loss"]):
            raise TuningError(f"step {number}: the loss is {line['loss']}; take a smaller learning rate.")
        record.steps.append(line)
        progress(number, steps, line)
    judge(steps, state.trained)
    done = jax.tree.map(lambda new, old: new.astype(old.dtype), state.trained, part)
    return {**fixed, **done}, record


def _arrays(rows: RewardRows) -> tuple[np.ndarray, ...]:
    return rows.tokens, rows.mask, rows.targets, rows.counted


def _rows_of(step: int, count: int, batch: int, seed: int) -> np.ndarray:
    """The rows of a step: of an endless sequence of orders drawn anew, so many after those before."""
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {n: np.random.default_rng((seed, n)).permutation(count) for n in set((places // count).tolist())}
    return np.array([orders[place // count][place % count] for place in places.tolist()])


def _check_rows(reward: RewardModel, rows: RewardRows, steps: int, batch: int) -> None:
    require_rows(steps >= 1 and batch >= 1, f"{steps} steps of {batch} rows", "at least one of each")
    if rows.pairs:
        require_rows(
            reward.kind == "outcome", "pairs for a head of steps", "a reward model of kind 'outcome'"
        )
        return
    require_rows(bool(rows.counted.any()), "no labels", "at least one")
    most, labels = int(rows.targets[rows.counted].max()), max(2, len(reward.labels))
    least = int(rows.targets[rows.counted].min())
    require_rows(
        least >= 0 and most < labels, f"labels from {least} to {most}", f"those from 0 to {labels - 1}"
    )
    if reward.kind == "outcome":
        last = rows.tokens.shape[1] - 1 - np.argmax(rows.mask[:, ::-1], axis=1)
        there = rows.counted[np.arange(len(last)), last]
        require_rows(
            bool((rows.counted.sum(axis=1) == there).all()),
            "labels of steps for a head of outcomes",
            "labels at the last tokens (outcome_rows)",
        )


@partial(jax.jit, static_argnames="loss")
def _judged(trained: Any, fixed: Any, batch: Any, *, loss: _RewardLoss) -> Sums:
    return loss(trained, fixed, batch)
