"""Logistic probes on latents: the best single one of all, and the best few together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.sae import SAE
from mergelab.sae.splice import read_passes

__all__ = [
    "ProbeLoss",
    "SparseProbe",
    "best_probes",
    "fit_logistic",
    "probe_losses",
    "rows_with_labels",
    "sparse_probe",
]

_ITERATIONS = 50
_EXACT = 1e-9  # nats: a fit is finished where the loss cannot fall by more
_RIDGE = 1e-6  # on standardized inputs: keeps separable classes from running away


@dataclass(frozen=True)
class ProbeLoss:
    """The best one-dimensional probe of a task.

    Attributes:
        loss: mean cross-entropy, in nats per token.
        latent: number of the latent that it reads.
        prior: the cross-entropy of always saying the class's frequency: what a useless latent gives.
    """

    loss: float
    latent: int
    prior: float


@dataclass(frozen=True)
class SparseProbe:
    """A probe on a few latents, judged on rows it was not fitted on.

    Attributes:
        latents: numbers of the latents that it reads.
        loss: held-out cross-entropy, in nats per row.
        accuracy: fraction of held-out rows classified correctly.
        f1: held-out F1 of the positive class; 0 where nothing is found.

    Where classes are balanced, each weighs half of the held-out rows in all three.
    """

    latents: tuple[int, ...]
    loss: float
    accuracy: float
    f1: float


@jax.jit
def fit_logistic(x: Array, y: Array, weight: Array | None = None) -> tuple[Array, Array, Array]:
    """Logistic regression by Newton's method, the step halved while it would not improve.

    Args:
        x: `[rows, k]`, float32; constant columns get weight 0.
        y: `[rows]`, 0 or 1.
        weight: `[rows]`, float32, of mean 1: what each row counts; all the same if None.

    Returns:
        Weights `[k]`, bias (scalar), and the mean cross-entropy in nats (scalar). The weights are those of no
        penalty but 5e-7 times the square of each weight on standardized columns.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    z = jnp.concatenate([(x - mean[None]) / scale[None], jnp.ones((len(x), 1), x.dtype)], axis=1)
    penalty = jnp.full(z.shape[1], _RIDGE, x.dtype).at[-1].set(0)
    y = y.astype(x.dtype)
    rows = jnp.ones_like(y) if weight is None else weight
    rate = jnp.clip((rows * y).mean(), 1e-6, 1 - 1e-6)

    def objective(w: Array) -> Array:
        logits = z @ w
        return (rows * (jax.nn.softplus(logits) - y * logits)).mean() + 0.5 * (penalty * w * w).sum()

    def unfinished(state: tuple[Array, ...]) -> Array:
        number, _, _, damping, decrement = state
        # A step that no longer helps at any length is the noise of float32.
        return (number < _ITERATIONS) & (decrement > _EXACT) & (damping > 1e-3)

    def improve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        number, w, loss, damping, _ = state
        p = jax.nn.sigmoid(z @ w)
        gradient = z.T @ (rows * (p - y)) / len(x) + penalty * w
        curvature = rows * jnp.maximum(p * (1 - p), 1e-7)
        hessian = (z * curvature[:, None]).T @ z / len(x) + jnp.diag(penalty)
        step = jnp.linalg.solve(hessian, gradient)
        there = w - damping * step
        value = objective(there)
        better = value <= loss
        damping = jnp.where(better, jnp.minimum(2 * damping, 1), damping / 4)
        w, loss = jnp.where(better, there, w), jnp.where(better, value, loss)
        return number + 1, w, loss, damping, gradient @ step

    start = jnp.zeros(z.shape[1], x.dtype).at[-1].set(jnp.log(rate / (1 - rate)))
    one = jnp.ones((), x.dtype)
    state = (jnp.zeros((), jnp.int32), start, objective(start), one, one * jnp.inf)
    _, w, *_ = lax.while_loop(unfinished, improve, state)
    logits = z @ w
    loss = (rows * (jax.nn.softplus(logits) - y * logits)).mean()
    weights = w[:-1] / scale
    return weights, w[-1] - (weights * mean).sum(), loss


class _Probes(NamedTuple):
    """One-dimensional probes while they are fitted; every field `[columns]`.

    The gradient and the Hessian are those at `w` and `b`, of the loss with its penalty.
    """

    w: Array
    b: Array
    loss: Array
    g_w: Array
    g_b: Array
    h_ww: Array
    h_wb: Array
    h_bb: Array

    def step(self) -> tuple[Array, Array]:
        """Newton's step, to be subtracted."""
        determinant = self.h_ww * self.h_bb - self.h_wb * self.h_wb
        w = (self.h_bb * self.g_w - self.h_wb * self.g_b) / determinant
        return w, (self.h_ww * self.g_b - self.h_wb * self.g_w) / determinant

    def decrement(self) -> Array:
        """Twice what the loss can still fall, about."""
        w, b = self.step()
        return w * self.g_w + b * self.g_b


def _probes_at(z: Array, y: Array, w: Array, b: Array) -> _Probes:
    """Loss, gradient and Hessian in one pass over standardized columns `[columns, rows]`."""
    logits = w[:, None] * z + b[:, None]
    p = jax.nn.sigmoid(logits)
    error, curvature = p - y[None], jnp.maximum(p * (1 - p), 1e-7)
    weighted = curvature * z
    return _Probes(
        w=w,
        b=b,
        loss=(jax.nn.softplus(logits) - y[None] * logits).mean(axis=1) + 0.5 * _RIDGE * w * w,
        g_w=(error * z).mean(axis=1) + _RIDGE * w,
        g_b=error.mean(axis=1),
        h_ww=(weighted * z).mean(axis=1) + _RIDGE,
        h_wb=weighted.mean(axis=1),
        h_bb=curvature.mean(axis=1),
    )


@partial(jax.jit, static_argnames="piece")
def _losses(values: Array, labels: Array, piece: int) -> Array:
    """What `fit_logistic` finds for each column alone, for columns in step with each other."""
    y = labels.astype(values.dtype)
    rate = jnp.clip(y.mean(), 1e-6, 1 - 1e-6)

    def some(columns: Array) -> Array:
        mean, scale = columns.mean(axis=1), columns.std(axis=1)
        z = (columns - mean[:, None]) / jnp.where(scale > 0, scale, 1)[:, None]
        none = jnp.zeros(piece, z.dtype)

        def unfinished(state: tuple[Array, _Probes, Array]) -> Array:
            number, here, damping = state
            # A step that no longer helps at any length is the noise of float32.
            return (number < _ITERATIONS) & ((here.decrement() > _EXACT) & (damping > 1e-3)).any()

        def improve(state: tuple[Array, _Probes, Array]) -> tuple[Array, _Probes, Array]:
            number, here, damping = state
            w, b = here.step()
            there = _probes_at(z, y, here.w - damping * w, here.b - damping * b)
            better = there.loss <= here.loss
            kept = _Probes(*(jnp.where(better, new, old) for new, old in zip(there, here, strict=True)))
            return number + 1, kept, jnp.where(better, jnp.minimum(2 * damping, 1), damping / 4)

        start = _probes_at(z, y, none, none + jnp.log(rate / (1 - rate)))
        _, found, _ = lax.while_loop(unfinished, improve, (jnp.zeros((), jnp.int32), start, none + 1))
        return found.loss - 0.5 * _RIDGE * found.w * found.w

    return lax.map(some, values.T.reshape(-1, piece, len(values))).reshape(-1)


def probe_losses(values: np.ndarray, labels: np.ndarray, *, piece: int = 16) -> np.ndarray:
    """Cross-entropy of the best logistic probe on each column alone, all solved at once.

    Args:
        values: `[rows, n]`; for an SAE, its pre-activations (arXiv 2406.04093, section 4.2).
        labels: `[rows]`, bool, both classes present.
        piece: columns solved together: memory is `4 * rows * piece` bytes a few times over.

    Returns:
        `[n]`, float32, nats per row.

    Raises:
        SAEError: a class is missing.
    """
    _check(values, labels)
    n = values.shape[1]
    filled = np.pad(values, ((0, 0), (0, -n % piece)))
    return np.asarray(_losses(jnp.asarray(filled, jnp.float32), jnp.asarray(labels), piece))[:n]


def best_probes(values: np.ndarray, tasks: Mapping[str, np.ndarray]) -> dict[str, ProbeLoss]:
    """The probe loss of every task: the least over latents.

    Args:
        values: `[rows, n]`.
        tasks: labels `[rows]`, bool, by name.

    Raises:
        SAEError: a task lacks a class.
    """
    found = {}
    for name, labels in tasks.items():
        losses = probe_losses(values, labels)
        p = float(labels.mean())
        prior = -(p * np.log(p) + (1 - p) * np.log(1 - p))
        found[name] = ProbeLoss(float(losses.min()), int(losses.argmin()), float(prior))
    return found


def sparse_probe(
    codes: np.ndarray,
    labels: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    balanced: bool = False,
    groups: np.ndarray | None = None,
) -> SparseProbe:
    """Fits a probe on the k latents whose means differ most between the classes (arXiv 2305.01610).

    Half of the rows, drawn at random, choose and fit; the other half judges.

    Args:
        codes: `[rows, n]`.
        labels: `[rows]`, bool.
        k: latents it may read.
        seed: seed of the split into halves.
        balanced: whether both classes weigh the same, in the fit and in the figures, however many rows each
            has.
        groups: `[rows]`, whole numbers; rows of one group stay in one half.

    Raises:
        SAEError: a class is missing in either half, or there are fewer than k latents.
    """
    if not 1 <= k <= codes.shape[1]:
        raise SAEError(f"k is {k}; a probe may read 1 to {codes.shape[1]} latents.")
    train, test = _halves(len(codes), groups, seed)
    _check(codes[train], labels[train])
    _check(codes[test], labels[test])
    x, y = codes[train], labels[train]
    gap = np.abs(x[y].mean(axis=0) - x[~y].mean(axis=0))
    latents = np.argsort(-gap, kind="stable")[:k]
    weight = None if not balanced else jnp.asarray(_weights(y), jnp.float32)
    weights, bias, _ = fit_logistic(jnp.asarray(x[:, latents], jnp.float32), jnp.asarray(y), weight)
    logits = codes[test][:, latents] @ np.asarray(weights) + float(bias)
    truth = labels[test]
    said, counts = logits > 0, _weights(truth) if balanced else np.ones(len(truth))
    hits = float(counts[said & truth].sum())
    return SparseProbe(
        latents=tuple(int(latent) for latent in latents),
        loss=float((counts * (np.logaddexp(0, logits) - truth * logits)).mean()),
        accuracy=float((counts * (said == truth)).mean()),
        f1=2 * hits / max(float(counts[said].sum() + counts[truth].sum()), 1),
    )


def _halves(rows: int, groups: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that fit, and of those that judge."""
    rng = np.random.default_rng(seed)
    if groups is None:
        order = rng.permutation(rows)
        return order[: rows // 2], order[rows // 2 :]
    _, places = np.unique(groups, return_inverse=True)
    order = rng.permutation(int(places.max()) + 1)
    fits = np.isin(places, order[: len(order) // 2])
    return np.flatnonzero(fits), np.flatnonzero(~fits)


def _weights(labels: np.ndarray) -> np.ndarray:
    """What rows count where both classes are to weigh half: float64 `[rows]`, of mean 1."""
    share = labels.mean()
    return np.where(labels, 0.5 / share, 0.5 / (1 - share))


def _check(values: np.ndarray, labels: Sequence[bool] | np.ndarray) -> None:
    share = float(np.mean(labels))
    if len(values) != len(labels) or not 0 < share < 1:
        raise SAEError(
            f"{len(values)} rows have {len(labels)} labels, {share:.1%} of them true; expected as many of "
            "each, and both classes."
        )


_RARE = 0.01  # a task with fewer positives or negatives says nothing


def rows_with_labels(
    sae: SAE, evidence: Evidence, what: Callable[[SAE, jax.Array], jax.Array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes or pre-activations of the judged text's start, as much as fits in memory, and their labels.

    Of the tokens that count.

    Args:
        sae: SAE that reads the first of the source's sites.
        evidence: the text and its labels.
        what: `(sae, activations [rows, d])` -> `[rows, n]`, jittable.

    Returns:
        `[rows, n]`, and by task labels `[rows]`, without tasks of which either class is rare.
    """
    contexts, source = evidence.held_contexts(sae.n_latents), evidence.judge
    run = jax.jit(what)
    filled = source.batch * source.tokens.shape[1]  # one shape, one program
    rows, counts = [], []
    for (x, *_), kept in read_passes(source, contexts):
        found = np.asarray(run(sae, jnp.asarray(np.pad(x, ((0, filled - len(x)), (0, 0))))))[: len(x)]
        rows.append(found if kept.all() else found[kept])
        counts.append(kept)
    kept = np.concatenate(counts)
    labels = {name: label[:contexts].reshape(-1)[kept] for name, label in evidence.labels.items()}
    return np.concatenate(rows), {n: v for n, v in labels.items() if _RARE < v.mean() < 1 - _RARE}


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    pre, tasks = rows_with_labels(sae, evidence, lambda d, x: d.pre_activations(x))
    if not tasks:
        raise SAEError("no probing task has both classes in the text; give other text, or more.")
    best = best_probes(pre, tasks)
    del pre
    mean = float(np.mean([probe.loss for probe in best.values()]))
    part = float(np.mean([probe.loss / probe.prior for probe in best.values()]))
    yield "loss", mean, f"best latent of each, mean of {len(tasks)} tasks; 0 perfect"
    yield "relative_loss", part, "over always saying the class's frequency; 1 useless"
    codes, tasks = rows_with_labels(sae, evidence, lambda d, x: d.encode(x))
    rates = np.array([labels.mean() for labels in tasks.values()])
    always = float((2 * rates / (1 + rates)).mean())
    majority = float(np.maximum(rates, 1 - rates).mean())
    for k in (1, 2, 5):
        f1 = [sparse_probe(codes, labels, k, seed=options.seed).f1 for labels in tasks.values()]
        against = f"probe on {k} latents, held-out; 1 perfect, {always:.3g} always saying yes"
        yield f"f1_{k}", float(np.mean(f1)), against
    how = "classes balanced by weights, so 0.5 is always one answer"
    how = how if options.balance else f"classes as frequent as they are, so {majority:.3g} is the majority"
    for k in (1, 2, 5):
        probes = [
            sparse_probe(codes, labels, k, seed=options.seed, balanced=options.balance)
            for labels in tasks.values()
        ]
        accuracy = float(np.mean([probe.accuracy for probe in probes]))
        yield f"accuracy_{k}", accuracy, f"probe on {k} latents, held-out; {how}"
    yield "base_rate", float(rates.mean()), "fraction of the tokens that are a yes, mean of tasks"
    yield "majority", majority, "accuracy of always saying the more frequent, classes not balanced"


METRIC = Metric(
    name="probing",
    about="properties of tokens that single latents tell",
    units={
        "loss": "nats / token", "relative_loss": "", "f1_1": "", "f1_2": "", "f1_5": "",
        "accuracy_1": "", "accuracy_2": "", "accuracy_5": "", "base_rate": "", "majority": "",
    },
    measure=_scores,
    needs=("labels",),
)  # fmt: skip
