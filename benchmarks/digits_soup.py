"""Greedy soup against picking the best model, on scikit-learn's digits; and two settings where it fails.

Twelve siblings are fine-tuned from one pre-trained network with equal budgets, each on its own random
augmentation of the training images (shift by up to one pixel, noise). Selection sees the validation images
only; every figure printed is on test images that nothing else has seen.

    python -m benchmarks.digits_soup                # 6 seeds, writes benchmarks/results/digits_soup.json
    python -m benchmarks.digits_soup --seeds 2 --out ''
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from mergelab.merging.soups import RunningAverage, greedy_soup

__all__ = ["SETTINGS", "Outcome", "Setting", "experiment"]

WIDTHS = (64, 128, 128, 10)
SIBLINGS = 12
STEPS = 300
RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """What the siblings are trained and judged on.

    Attributes:
        name: a key for the results.
        shift: images are moved by up to this many pixels in each direction.
        noise: deviation of the normal noise added to pixels in [0, 1].
        steps: fine-tuning steps of the siblings, repeated to their number; pre-training takes 300.
    """

    name: str
    shift: int = 1
    noise: float = 0.25
    steps: tuple[int, ...] = (STEPS,)


SETTINGS = (
    Setting("augmented"),
    Setting("clean", shift=0, noise=0.0),
    Setting("unequal_budgets", steps=(10, 30, 100, STEPS)),
)


@dataclass(frozen=True)
class Outcome:
    """Test accuracies of one seed (per cent), and how many siblings the greedy soup kept."""

    best_single: float
    greedy: float
    uniform: float
    ensemble: float
    members: int


@dataclass(frozen=True)
class Data:
    """Images float32 `[n, 8, 8]` in [0, 1] and labels int32 `[n]`."""

    images: Float[Array, "n 8 8"]
    labels: Int[Array, " n"]


def split_digits(seed: int) -> tuple[Data, Data, Data]:
    """A random split of the 1,797 digits: 600 to train, 400 to validate, 797 to test."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(digits))
    images = jnp.asarray(pixels[order].reshape(-1, 8, 8) / 16.0, jnp.float32)
    labels = jnp.asarray(digits[order], jnp.int32)
    train, validation, test = (
        Data(images[p], labels[p]) for p in np.split(np.arange(len(labels)), [600, 1000])
    )
    return train, validation, test


def augment(key: Array, images: Float[Array, "n 8 8"], setting: Setting) -> Float[Array, "n 64"]:
    """Each image moved by its own whole-pixel shift (zeros enter) with noise added, flattened."""
    s = setting.shift
    where, pixels = jax.random.split(key)
    offsets = jax.random.randint(where, (len(images), 2), 0, 2 * s + 1)
    padded = jnp.pad(images, ((0, 0), (s, s), (s, s)))
    moved = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, (8, 8)))(padded, offsets)
    return (moved + setting.noise * jax.random.normal(pixels, moved.shape)).reshape(-1, 64)


@jax.jit
def init(key: Array) -> PyTree[Array]:
    """He-normal weights `[in, out]` and zero biases."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * jnp.sqrt(2 / a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


@jax.jit
def apply(params: PyTree[Array], x: Float[Array, "n 64"]) -> Float[Array, "n 10"]:
    """Logits."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


@jax.jit
def train(
    params: PyTree[Array], x: Float[Array, "n 64"], y: Int[Array, " n"], key: Array, steps: Array
) -> PyTree[Array]:
    """Adam on random batches of 64 for `steps` steps, at most `STEPS`: siblings run as one program."""
    adam = optax.adam(RATE)

    def loss(p: PyTree[Array], batch: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(p, x[batch]), y[batch]).mean()

    def step(carry: Any, i: Array) -> tuple[Any, None]:
        p, state = carry
        batch = jax.random.randint(jax.random.fold_in(key, i), (64,), 0, len(x))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer step count
            updates, new_state = adam.update(jax.grad(loss)(p, batch), state, p)
        moved = (optax.apply_updates(p, updates), new_state)
        return jax.tree.map(lambda new, old: jnp.where(i < steps, new, old), moved, carry), None

    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), jnp.arange(STEPS))
    return params


def siblings(setting: Setting, data: Data, key: Array) -> dict[str, PyTree[Array]]:
    """Networks fine-tuned from one pre-trained one, each on its own augmentation, all trained at once."""
    start, pre, views, batches = jax.random.split(key, 4)
    flat = data.images.reshape(-1, 64)
    shared = train(init(start), flat, data.labels, pre, jnp.asarray(STEPS))
    x = jax.vmap(lambda k: augment(k, data.images, setting))(jax.random.split(views, SIBLINGS))
    steps = jnp.asarray(np.resize(setting.steps, SIBLINGS))
    keys = jax.random.split(batches, SIBLINGS)
    stacked = jax.vmap(train, in_axes=(None, 0, None, 0, 0))(shared, x, data.labels, keys, steps)
    return {f"sibling_{i:02}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(SIBLINGS)}


@jax.jit
def accuracy(logits: Float[Array, "n 10"], labels: Int[Array, " n"]) -> Array:
    """Per cent."""
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def experiment(setting: Setting, seed: int) -> Outcome:
    """Trains the siblings and compares greedy soup, best by validation, uniform soup and ensemble on test."""
    train_data, validation, test = split_digits(seed)
    training, seeing, judging = jax.random.split(jax.random.key(seed), 3)
    candidates = siblings(setting, train_data, training)
    x_validation = augment(seeing, validation.images, setting)
    x_test = augment(judging, test.images, setting)

    def ensemble(trees: Iterator[PyTree[Array]]) -> float:
        logits = RunningAverage.of(apply(next(trees), x_test))
        for tree in trees:
            logits = logits.add(apply(tree, x_test))
        return float(accuracy(logits.result(), test.labels))

    soup = greedy_soup(
        candidates,
        lambda tree: float(accuracy(apply(tree, x_validation), validation.labels)),
        selection="accuracy",
        test_evaluate=lambda tree: float(accuracy(apply(tree, x_test), test.labels)),
        test_ensemble=ensemble,
    )
    on_test = {name: scores["accuracy"] for name, scores in soup.trace.test.items()}
    return Outcome(
        best_single=on_test["best_single"],
        greedy=on_test["soup"],
        uniform=on_test["uniform"],
        ensemble=on_test["ensemble"],
        members=len(soup.trace.members),
    )


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Means over seeds, and in how many of them the greedy soup beat the best single model."""
    gains = [o.greedy - o.best_single for o in outcomes]
    means = {name: statistics.mean(getattr(o, name) for o in outcomes) for name in asdict(outcomes[0])}
    return {
        **{name: round(value, 2) for name, value in means.items()},
        "gain": round(statistics.mean(gains), 2),
        "gains": [round(gain, 2) for gain in gains],
        "wins": sum(gain > 0 for gain in gains),
        "seeds": len(outcomes),
    }


def main() -> None:
    """Runs all settings, prints the table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "digits_soup.json"))
    options = parser.parse_args()
    results = {}
    head = ("setting", "best single", "greedy", "uniform", "ensemble", "members", "gain", "wins")
    print(" | ".join(head))
    for setting in SETTINGS:
        row = summary([experiment(setting, seed) for seed in range(options.seeds)])
        results[setting.name] = {"setting": asdict(setting), **row}
        columns = [f"{row[n]:.2f}" for n in ("best_single", "greedy", "uniform", "ensemble", "members")]
        print(" | ".join([setting.name, *columns, f"{row['gain']:+.2f}", f"{row['wins']}/{row['seeds']}"]))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
