"""The operators' formulas in plain numpy float64, written from their papers, to judge float32 results by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

Array = np.ndarray


def slerp(a: Array, b: Array, t: float) -> Array:
    """The arc from `a` to `b`, unnormalized; a straight line where they are nearly parallel."""
    cosine = np.clip(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def linear(models: Sequence[Array], weight: Sequence[float]) -> Array:
    return np.average(models, axis=0, weights=weight)


def multislerp(models: Sequence[Array], weight: Sequence[float]) -> Array:
    """One tangent step at the normalized weighted mean direction, at the weighted mean norm."""
    w = np.asarray(weight, np.float64) / np.sum(weight)
    norms = np.array([np.linalg.norm(x) for x in models])
    units = np.stack([x.ravel() / n for x, n in zip(models, norms, strict=True)])
    mean = w @ units
    mean /= np.linalg.norm(mean)
    tangent = w @ (units - np.outer(units @ mean, mean))
    tau = np.linalg.norm(tangent)
    return ((np.cos(tau) * mean + np.sin(tau) / tau * tangent) * (w @ norms)).reshape(models[0].shape)


def karcher(models: Sequence[Array], steps: int = 10) -> Array:
    """Fixed-point iteration for the mean direction on the sphere, at the mean norm."""
    norms = np.array([np.linalg.norm(x) for x in models])
    units = np.stack([x.ravel() / n for x, n in zip(models, norms, strict=True)])
    mean = units.mean(0)
    mean /= np.linalg.norm(mean)
    for _ in range(steps):
        dots = units @ mean
        theta = np.arccos(np.clip(dots, -1, 1))
        tangent = np.mean((theta / np.sin(theta))[:, None] * (units - np.outer(dots, mean)), axis=0)
        size = np.linalg.norm(tangent)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)
    return (norms.mean() * mean).reshape(models[0].shape)


def model_stock(models: Sequence[Array], base: Array) -> Array:
    deltas = [(x - base).ravel() for x in models]
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(deltas, 2)]
    c, n = float(np.mean(cosines)), len(models)
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(models, axis=0) + (1 - t) * base


def largest(keys: Array, count: int) -> Array:
    """Bool mask of the `count` largest keys over the whole array; ties go to the lowest index."""
    flat = keys.ravel()
    order = np.lexsort((np.arange(flat.size), -flat))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(keys.shape)


def ties(models: Sequence[Array], base: Array, weight: Sequence[float], density: Sequence[float]) -> Array:
    """Trim per model, elect the sign of the weighted sum (zero elects +), average those that agree."""
    deltas = np.stack([x - base for x in models])
    for delta, d in zip(deltas, density, strict=True):
        delta[~largest(np.abs(delta), max(1, int(d * delta.size)) if d > 0 else 0)] = 0
    w = np.asarray(weight, np.float64).reshape(-1, *[1] * base.ndim)
    votes = w * deltas
    agree = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    divisor = (w * agree).sum(0)
    return base + (votes * agree).sum(0) / np.where(divisor == 0, 1, divisor)


def arcee_fusion(x: Array, base: Array) -> Array:
    """The base, with the changes whose `|delta| KL` reaches median + 1.5 interquartile ranges taken over."""

    def softmax(v: Array) -> Array:
        e = np.exp(v - v.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(x), softmax(base)
    importance = np.abs(x - base) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(f * (ordered.size - 1))] for f in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), x, base)
