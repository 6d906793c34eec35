"""What lies between two networks: siblings, strangers, and one network with its units re-ordered."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from benchmarks.science_parts.networks import accuracy, digits, features, init_trunk, loss, permuted, train
from mergelab import operators as ops

__all__ = ["Connectivity", "connectivity"]

WIDTHS = (64, 128, 128)


class Connectivity(NamedTuple):
    """Barriers between pairs of networks, and what re-ordering units changes.

    A barrier is the most by which the loss on test images (nats), or the error rate, exceeds the straight
    line between its values at both ends, on 11 points.
    """

    siblings_loss: float
    siblings_error: float
    strangers_loss: float
    strangers_error: float
    permuted_loss: float
    permuted_error: float
    permuted_output: float
    """The largest difference of a logit, relative to the largest logit."""


def connectivity(seed: int, steps: int = 300, points: int = 11) -> Connectivity:
    """Trains two siblings of one base and a stranger from another start, and walks between them."""
    data, _, test = digits(seed)
    keys = jax.random.split(jax.random.key(seed), 7)
    learn = partial(train, rate=1e-3, steps=steps, trains_heads=True)

    def trained(net: Any, key: jax.Array) -> Any:
        trunk, heads = learn(net["trunk"], net["head"][None], data.flat[None], data.labels, key)
        return {"trunk": trunk, "head": heads[0]}

    def fresh(key: jax.Array) -> Any:
        inside, head = jax.random.split(key)
        kernel = jax.random.normal(head, (WIDTHS[-1], 10)) * np.float32(WIDTHS[-1] ** -0.5)
        return {"trunk": init_trunk(inside, WIDTHS), "head": kernel}

    base = trained(fresh(keys[0]), keys[1])
    a, b = (trained(base, key) for key in keys[2:4])
    stranger = trained(trained(fresh(keys[4]), keys[5]), keys[3])
    mirror = dict(zip(("trunk", "head"), permuted(a["trunk"], a["head"], keys[6]), strict=True))

    @jax.jit
    def along(one: PyTree, other: PyTree) -> tuple[jax.Array, jax.Array]:
        def at(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
            net = ops.wise_ft(alpha=alpha)([other], one)
            inside = (net["trunk"], net["head"], test.flat, test.labels)
            return loss(*inside), 1 - accuracy(*inside)

        return jax.vmap(at)(jnp.linspace(0, 1, points))

    def barriers(one: PyTree, other: PyTree) -> tuple[float, float]:
        found = []
        for values in map(np.asarray, along(one, other)):
            line = np.linspace(values[0], values[-1], points)
            found.append(float(np.max(values - line)))
        return found[0], found[1]

    outputs = [np.asarray(features(net["trunk"], test.flat) @ net["head"]) for net in (a, mirror)]
    output = float(np.max(np.abs(outputs[0] - outputs[1])) / np.max(np.abs(outputs[0])))
    (near, near_error), (far, far_error), (turned, turned_error) = (
        barriers(a, x) for x in (b, stranger, mirror)
    )
    return Connectivity(near, near_error, far, far_error, turned, turned_error, output)
