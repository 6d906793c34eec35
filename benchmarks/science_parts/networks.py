"""scikit-learn's digits, small networks that read them, and their training: what all experiments share."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

__all__ = ["Split", "accuracy", "digits", "features", "init_trunk", "loss", "permuted", "train"]

Trunk = PyTree[Array]
Head = Float[Array, "width 10"]
BATCH = 64


class Split(NamedTuple):
    """Images float32 `[n, 8, 8]` in [0, 1] and labels int32 `[n]`."""

    images: Float[Array, "n 8 8"]
    labels: Int[Array, " n"]

    @property
    def flat(self) -> Float[Array, "n 64"]:
        return self.images.reshape(-1, 64)


def digits(seed: int) -> tuple[Split, Split, Split]:
    """A random split of the 1,797 digits: 1,000 to train, 297 to validate, 500 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = jnp.asarray(pixels[order].reshape(-1, 8, 8) / 16.0, jnp.float32)
    truth = jnp.asarray(labels[order], jnp.int32)
    pieces = np.split(np.arange(len(labels)), [1000, 1297])
    train_, validation, test = (Split(images[p], truth[p]) for p in pieces)
    return train_, validation, test


def init_trunk(key: Array, widths: tuple[int, ...]) -> Trunk:
    """Layers of He-normal kernels `[in, out]` and zero biases."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * np.float32((2 / a) ** 0.5), "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def features(trunk: Trunk, x: Float[Array, "n 64"]) -> Float[Array, "n width"]:
    """What the last layer of the trunk gives, rectified."""
    for layer in trunk:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


def loss(trunk: Trunk, head: Head, x: Float[Array, "n 64"], y: Int[Array, " n"]) -> Array:
    """Cross-entropy in nats, mean over images."""
    logits = features(trunk, x) @ head
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(trunk: Trunk, head: Head, x: Float[Array, "n 64"], y: Int[Array, " n"]) -> Array:
    """Fraction of images whose largest logit is that of the label."""
    return jnp.mean(jnp.argmax(features(trunk, x) @ head, axis=-1) == y)


@partial(jax.jit, static_argnames=("steps", "trains_heads"))
def train(
    trunk: Trunk,
    heads: Float[Array, "tasks width 10"],
    x: Float[Array, "tasks n 64"],
    y: Int[Array, " n"],
    key: Array,
    *,
    rate: Array | float,
    steps: int,
    trains_heads: bool,
) -> tuple[Trunk, Float[Array, "tasks width 10"]]:
    """Adam on random batches of 64 images, the mean loss over all tasks; heads are frozen or train too."""
    adam = optax.adam(rate)

    def objective(p: Any, batch: Array) -> Array:
        own = p[1] if trains_heads else heads
        return jax.vmap(lambda h, one: loss(p[0], h, one[batch], y[batch]))(own, x).mean()

    def step(carry: Any, i: Array) -> tuple[Any, None]:
        p, state = carry
        batch = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(y))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer step count
            updates, state = adam.update(jax.grad(objective)(p, batch), state, p)
        return (optax.apply_updates(p, updates), state), None

    start: Any = (trunk, heads) if trains_heads else (trunk, None)
    (found, _), _ = jax.lax.scan(step, (start, adam.init(start)), jnp.arange(steps))
    return found[0], found[1] if trains_heads else heads


def permuted(trunk: Trunk, head: Head, key: Array) -> tuple[Trunk, Head]:
    """The same function with the units of every layer of the trunk in another order."""
    order = None
    layers = []
    for layer, k in zip(trunk, jax.random.split(key, len(trunk)), strict=True):
        rows = layer["kernel"] if order is None else layer["kernel"][order]
        order = jax.random.permutation(k, rows.shape[1])
        layers.append({"kernel": rows[:, order], "bias": layer["bias"][order]})
    return layers, head[order]
