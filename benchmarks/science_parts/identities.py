"""What operators do exactly, on arrays made up for it; each beside a control that must not fulfill it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from mergelab import operators as ops

__all__ = ["Identity", "identities"]

TOLERANCE = 1e-5
SIGMAS = 4.0


class Identity(NamedTuple):
    """A law, how far an operator is from it, how far it may be, and how far the control is.

    Distances are relative to the largest expected value, or in standard errors where the law is of chance.
    """

    name: str
    distance: float
    allowed: float
    control_name: str
    control: float


def identities(seed: int) -> list[Identity]:
    """All laws at one seed."""
    rng = np.random.default_rng(seed)
    return [*_dare(rng, seed), *_slerp(rng), _model_stock(rng), _iso_c(rng), _tsv_m(rng), _regmean(rng)]


def _merged(merge: ops.Merge, kernels: list[np.ndarray], base: np.ndarray | None, **more: Any) -> np.ndarray:
    """The merge of trees that hold one kernel `[in, out]` each."""
    trees = [{"kernel": k.astype(np.float32)} for k in kernels]
    at = None if base is None else {"kernel": base.astype(np.float32)}
    return np.asarray(merge(trees, at, **more)["kernel"], np.float64)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def _orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def _dare(rng: np.random.Generator, seed: int) -> list[Identity]:
    """With drop probability p: `E = delta` and `Var = delta^2 p / (1 - p)`, summed over 2^18 entries."""
    p, q = 0.9, 0.1
    delta = np.abs(rng.normal(size=(512, 512))).astype(np.float32).astype(np.float64)
    error = [
        _merged(ops.dare_linear(weight=1.0, density=q, **more), [delta], 0 * delta, seed=seed) - delta
        for more in ({"rescale_by": "density"}, {"rescale": False})
    ]

    def mean(e: np.ndarray) -> float:
        return float(abs(np.sum(e)) / np.sqrt(np.sum(delta**2) * p / q))

    def variance(e: np.ndarray) -> float:
        spread = np.sqrt(np.sum(delta**4) * (p + q * (p / q) ** 4 - (p / q) ** 2))
        return float(abs(np.sum(e**2) - np.sum(delta**2) * p / q) / spread)

    return [
        Identity(f"DARE: {what}", of(error[0]), SIGMAS, "without rescaling", of(error[1]))
        for what, of in (("mean, in standard errors", mean), ("variance, in standard errors", variance))
    ]


def _slerp(rng: np.random.Generator) -> list[Identity]:
    """The norm stays where both norms are equal; at 90 degrees the average's is 0.707 of it."""
    a, b = (x / np.linalg.norm(x) for x in rng.normal(size=(2, 48, 32)))
    b = b - np.sum(a * b) * a
    b = b / np.linalg.norm(b)
    lengths = np.array([np.linalg.norm(_merged(ops.slerp(t=t), [b], a)) for t in (0.25, 0.5, 0.75)])
    straight = np.linalg.norm(_merged(ops.linear(weight=1.0), [a, b], None))
    opposite = np.linalg.norm(_merged(ops.slerp(t=0.5), [-a], a))
    unequal = np.linalg.norm(_merged(ops.slerp(t=0.5), [3 * b], a))
    return [
        Identity(
            "SLERP: norm of equally long vectors at 90 degrees",
            float(np.max(np.abs(lengths - 1))),
            TOLERANCE,
            "their average",
            float(abs(straight - 1)),
        ),
        Identity(
            "SLERP: the middle of opposite vectors is 0",
            float(opposite),
            TOLERANCE,
            "norm between lengths 1 and 3 is not their mean 2",
            float(abs(unequal - 2)),
        ),
    ]


def _model_stock(rng: np.random.Generator) -> Identity:
    """`base + t mean` with `t = K c / (1 + (K - 1) c)` for K task vectors of pairwise cosine c."""
    count, cosine = 4, 0.3
    frame = _orthogonal(rng, 64)[: count + 1].reshape(count + 1, 8, 8)
    deltas = [np.sqrt(cosine) * frame[0] + np.sqrt(1 - cosine) * one for one in frame[1:]]
    base = rng.normal(size=(8, 8))
    t = count * cosine / (1 + (count - 1) * cosine)
    expected = t * np.mean(deltas, axis=0)
    found = _merged(ops.model_stock(), [base + d for d in deltas], base) - base.astype(np.float32)
    control = _distance(np.mean(deltas, axis=0), expected)
    return Identity("Model Stock: ratio of the closed form", _distance(found, expected), TOLERANCE,
                    "the mean", control)  # fmt: skip


def _iso_c(rng: np.random.Generator) -> Identity:
    """A sum whose spectrum is flat is its own isotropic merge."""
    size = 24
    total = 0.5 * _orthogonal(rng, size)
    part = rng.normal(size=(size, size))
    zero = np.zeros((size, size))
    found = _merged(ops.iso_c(), [part, total - part], zero)
    return Identity("Iso-C: a flat spectrum is kept", _distance(found, total), TOLERANCE,
                    "another spectrum", _distance(_merged(ops.iso_c(), [part], zero), part))  # fmt: skip


def _tsv_m(rng: np.random.Generator) -> Identity:
    """Task vectors whose directions are orthogonal to each other are added, if they fill their share.

    Each of T tasks contributes `size / T` triples. If it has fewer, roundings of its float32 entries take the
    places that are left, as unit vectors that are orthogonal to nothing: that is the control.
    """
    tasks, size = 4, 32
    left, right = _orthogonal(rng, size), _orthogonal(rng, size)
    zero = np.zeros((size, size))

    def distance(rank: int) -> float:
        places = [slice(i * rank, (i + 1) * rank) for i in range(tasks)]
        deltas = [(left[:, at] * rng.uniform(0.5, 2, rank)) @ right[at] for at in places]
        return _distance(_merged(ops.tsv_m(), deltas, zero), np.sum(deltas, axis=0))

    return Identity("TSV-M: orthogonal task vectors of rank 8 of 32, four tasks, are added",
                    distance(8), TOLERANCE, "of rank 5: rounding fills the rest", distance(5))  # fmt: skip


def _regmean(rng: np.random.Generator) -> Identity:
    """Of linear models, each fitted to its own data, it is the fit to all data."""
    inputs = rng.normal(size=(3, 200, 12)) @ rng.normal(size=(3, 12, 12))
    outputs = rng.normal(size=(3, 200, 5))
    kernels = [np.linalg.lstsq(x, y)[0] for x, y in zip(inputs, outputs, strict=True)]
    pooled = np.linalg.lstsq(inputs.reshape(-1, 12), outputs.reshape(-1, 5))[0]
    grams = [{"kernel": (x.T @ x / len(x)).astype(np.float32)} for x in inputs]
    found = _merged(ops.regmean(), kernels, None, statistics=jax.tree.map(np.asarray, grams))
    average = _distance(np.mean(kernels, axis=0), pooled)
    return Identity("RegMean: least squares on the pooled data", _distance(found, pooled), TOLERANCE,
                    "the average", average)  # fmt: skip
