"""Eight tasks, the symmetries of the square applied to digits: one trunk for all, by every operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from benchmarks.science_parts.networks import Split, digits, features, init_trunk, loss, train
from mergelab import operators as ops
from mergelab.operators import Merge

__all__ = ["SCALES", "SHARED", "Family", "Size", "accuracies", "family", "merges", "scores", "symmetries"]

SCALES = (0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""What a merged task vector is multiplied by; the best on validation is judged on test."""

SHARED = (
    "average",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "model_stock",
    "wudi",
    "iso_c",
    "iso_cts",
    "tsv_m",
)
"""The merges that the experiment with one shared head makes."""

Trunk = PyTree[Array]


class Size(NamedTuple):
    """The networks and their training: steps and learning rates of the base and of the specialists."""

    widths: tuple[int, ...] = (64, 384, 384)
    base_steps: int = 32
    base_rate: float = 1e-3
    steps: int = 300
    rate: float = 1.5e-4
    train_images: int = 1000


class Family(NamedTuple):
    """A base, one specialist for each task, their heads, and the images of every task.

    Attributes:
        heads: `[tasks, width, 10]`, trained with the base and frozen since; all the same if shared.
        train, validation, test: images `[tasks, n, 64]` and labels `[n]`.
    """

    base: Trunk
    models: list[Trunk]
    heads: Float[Array, "tasks width 10"]
    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


def symmetries(images: Float[Array, "n 8 8"]) -> Float[Array, "8 n 64"]:
    """The images turned by 0, 90, 180 and 270 degrees, and their mirror images turned likewise."""
    turned = [jnp.rot90(one, k, axes=(1, 2)) for one in (images, images[:, :, ::-1]) for k in range(4)]
    return jnp.stack([one.reshape(-1, 64) for one in turned])


def family(seed: int, size: Size, *, shared_head: bool = False, rate: float | None = None) -> Family:
    """Trains a base on all tasks for a few steps, heads with it, then one trunk for each task alone.

    With `shared_head` one head serves all tasks, so that a network must answer without being told the task.
    """
    pieces = [Split(one.images[: size.train_images], one.labels[: size.train_images]) for one in digits(seed)]
    views = [(symmetries(one.images), one.labels) for one in pieces]
    (x, y), validation, test = views
    start, head, together, apart = jax.random.split(jax.random.key(seed), 4)
    width, tasks = size.widths[-1], len(x)
    heads = jax.random.normal(head, (1 if shared_head else tasks, width, 10)) * np.float32(width**-0.5)
    seen = (x.reshape(1, -1, 64), jnp.tile(y, tasks)) if shared_head else (x, y)
    begin = partial(train, rate=size.base_rate, steps=size.base_steps, trains_heads=True)
    base, heads = begin(init_trunk(start, size.widths), heads, *seen, together)
    heads = jnp.broadcast_to(heads, (tasks, width, 10))
    tune = partial(train, rate=size.rate if rate is None else rate, steps=size.steps, trains_heads=False)
    keys = jax.random.split(apart, tasks)
    models = [tune(base, heads[i : i + 1], x[i : i + 1], y, keys[i])[0] for i in range(tasks)]
    return Family(base, models, heads, (x, y), validation, test)


@jax.jit
def accuracies(
    trunk: Trunk, heads: Float[Array, "tasks width 10"], x: Float[Array, "tasks n 64"], y: Array
) -> Float[Array, " tasks"]:
    """One trunk's accuracy on each task."""
    logits = jax.vmap(lambda head, one: features(trunk, one) @ head)(heads, x)
    return jnp.mean(jnp.argmax(logits, axis=-1) == y[None], axis=-1)


@jax.jit
def scaled(base: Trunk, merged: Trunk, scale: Array) -> Trunk:
    """`base + scale (merged - base)`."""
    return jax.tree.map(lambda b, m: b + scale * (m - b), base, merged)


def best_scale(found: Family, merged: Trunk) -> tuple[float, Trunk]:
    """The scale of the merged task vector that is best on validation, and the trunk there."""
    trunks = {s: scaled(found.base, merged, jnp.float32(s)) for s in SCALES}
    points = {s: float(accuracies(t, found.heads, *found.validation).mean()) for s, t in trunks.items()}
    best = max(SCALES, key=points.__getitem__)
    return best, trunks[best]


def merges(tasks: int) -> Mapping[str, Merge]:
    """Every operator that takes a base and any number of models without data, by what the table calls it."""
    one = {"weight": 1.0}
    return {
        "average": ops.task_arithmetic(weight=1 / tasks),
        "task_arithmetic": ops.task_arithmetic(**one),
        "ties": ops.ties(**one, density=0.2),
        "dare_linear": ops.dare_linear(**one, density=0.5, rescale_by="density"),
        "dare_ties": ops.dare_ties(**one, density=0.5, rescale_by="density"),
        "darex": ops.darex(**one, q=0.5, density=0.3),
        "della": ops.della(**one, density=0.5),
        "della_linear": ops.della_linear(**one, density=0.5),
        "breadcrumbs": ops.breadcrumbs(**one, density=0.5),
        "breadcrumbs_ties": ops.breadcrumbs_ties(**one, density=0.5),
        "sce": ops.sce(select_topk=0.5),
        "ram": ops.ram(),
        "ramplus_tl": ops.ramplus_tl(),
        "multislerp": ops.multislerp(**one),
        "karcher": ops.karcher(),
        "model_stock": ops.model_stock(),
        "magmax": ops.magmax(),
        "consensus": ops.consensus(),
        "pcb": ops.pcb(),
        "lines": ops.lines(beta=0.5),
        "star": ops.star(),
        "svc": ops.svc(),
        "opcm": ops.opcm(),
        "knots": ops.knots(),
        "core_space": ops.core_space(method="tsv_m"),
        "wudi": ops.wudi(),
        "iso_c": ops.iso_c(),
        "iso_cts": ops.iso_cts(),
        "tsv_m": ops.tsv_m(),
        "emr (unified)": ops.emr(),
    }


def scores(found: Family, chosen: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Test accuracy, mean over tasks, of base, specialists and merges: as they come, and at their best scale.

    `chosen` names the data-free merges to make; None makes all, and those that need data too.
    """
    heads, tests = found.heads, found.test
    own = np.stack([accuracies(m, heads, *tests) for m in found.models])
    table: dict[str, dict[str, Any]] = {
        "base": {"plain": float(accuracies(found.base, heads, *tests).mean())},
        "individual": {"plain": float(np.diag(own).mean())},
        "a specialist on all tasks": {"plain": float(own.mean())},
    }

    def enter(name: str, merged: Trunk) -> None:
        scale, trunk = best_scale(found, merged)
        plain, tuned = (float(accuracies(t, heads, *tests).mean()) for t in (merged, trunk))
        table[name] = {"plain": plain, "tuned": tuned, "scale": scale}

    for name, merge in merges(len(found.models)).items():
        if chosen is None or name in chosen:
            based = merge.inputs.base != "as_input"
            enter(name, merge(found.models, found.base if based else None))
    if chosen is None:
        for name, merged in _with_data(found).items():
            enter(name, merged)
        each = [ops.emr(task=i)(found.models, found.base) for i in range(len(found.models))]
        of_task = np.diag(np.stack([accuracies(m, heads, *tests) for m in each]))
        table["emr (each task's own)"] = {"plain": float(of_task.mean())}
    return table


def _gram(x: Float[Array, "n width"]) -> Array:
    return jnp.matmul(x.T, x, precision="highest") / np.float32(len(x))


def _with_data(found: Family) -> dict[str, Trunk]:
    """Merges by statistics of each specialist on its own training images."""
    x, y = found.train
    inputs: Callable[[Trunk, Array], list[Array]] = jax.jit(
        lambda trunk, one: [_gram(features(trunk[:depth], one)) for depth in range(len(trunk))]
    )

    def grams(trunks: Sequence[Trunk]) -> list[Any]:
        each = [inputs(trunk, one) for trunk, one in zip(trunks, x, strict=True)]
        return [[{"kernel": gram} for gram in one] for one in each]

    # RegMean++: a layer's inputs are those behind the merged layers before it.
    behind = found.models
    for depth in range(len(found.base)):
        merged = ops.regmean_pp()(found.models, found.base, statistics=grams(behind))
        behind = [merged[: depth + 1] + one[depth + 1 :] for one in found.models]
    return {
        "regmean": ops.regmean()(found.models, found.base, statistics=grams(found.models)),
        "regmean_pp": behind[0],
        "fisher": ops.fisher()(found.models, found.base, statistics=_fishers(found, x, y)),
    }


def _fishers(found: Family, x: Array, y: Array, images: int = 256) -> list[Trunk]:
    """Means of squared gradients of the loss at the true label, over some training images."""

    @jax.jit
    def of(trunk: Trunk, head: Array, one: Array) -> Trunk:
        def square(total: Trunk, pair: tuple[Array, Array]) -> tuple[Trunk, None]:
            slope = jax.grad(loss)(trunk, head, pair[0][None], pair[1][None])
            return jax.tree.map(lambda t, g: t + g * g / images, total, slope), None

        zero = jax.tree.map(jnp.zeros_like, trunk)
        return jax.lax.scan(square, zero, (one[:images], y[:images]))[0]

    return [of(m, h, one) for m, h, one in zip(found.models, found.heads, x, strict=True)]
