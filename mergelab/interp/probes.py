"""Linear probes of activations: least squares, ridge and logistic regression, solved exactly, many at once.

The objectives are scikit-learn's: intercepts are not penalized, and data are neither scaled nor weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mergelab.activations.batches import map_pieces
from mergelab.compat import register_dataclass
from mergelab.errors import SiteError

__all__ = ["Probe", "fit_linear", "fit_logistic", "fit_ridge"]


@register_dataclass
@dataclass(frozen=True)
class Probe:
    """Affine maps of activations, one for each target.

    Attributes:
        weights: float32 `[width, targets]`.
        bias: float32 `[targets]`.
    """

    weights: Float[Array, "width targets"]
    bias: Float[Array, " targets"]

    def __call__(self, x: Float[Array, "rows width"]) -> Float[Array, "rows targets"]:
        """`x @ weights + bias`: values of a regression, log-odds of a classification."""
        return jnp.matmul(x.astype(jnp.float32), self.weights, precision="highest") + self.bias[None]


def fit_linear(x: Any, y: Any) -> Probe:
    """Least squares: minimizes `|y - x w - b|^2`; of several solutions the one with the smallest `w`.

    Args:
        x: activations `[rows, width]`.
        y: targets `[rows]` or `[rows, targets]`.

    Raises:
        SiteError: shapes do not fit together.
    """
    return _ridge(*_checked(x, y), jnp.float32(0.0))


def fit_ridge(x: Any, y: Any, l2: float = 1.0) -> Probe:
    """Ridge regression: minimizes `|y - x w - b|^2 + l2 |w|^2`, through one singular value decomposition.

    Args:
        x: activations `[rows, width]`.
        y: targets `[rows]` or `[rows, targets]`.
        l2: the penalty, at least 0.

    Raises:
        SiteError: shapes do not fit together, or the penalty is negative.
    """
    if l2 < 0:
        raise SiteError(f"the penalty of a ridge probe is {l2}; give 0 or more.")
    return _ridge(*_checked(x, y), jnp.float32(l2))


def fit_logistic(x: Any, y: Any, l2: float = 1.0, *, steps: int = 50, targets_at_once: int = 8) -> Probe:
    """Logistic regression: minimizes `sum log(1 + exp(-s z)) + l2 / 2 |w|^2`, `z = x w + b`, `s = 2 y - 1`.

    Damped Newton steps, until a step changes nothing. `l2` is scikit-learn's `1 / C`.

    Args:
        x: activations `[rows, width]`.
        y: True for positive rows, `[rows]` or `[rows, targets]`.
        l2: the penalty, above 0: separable data have no solution without one.
        steps: maximum number of steps.
        targets_at_once: probes solved side by side; each needs a `[width, width]` matrix.

    Raises:
        SiteError: shapes do not fit together, the penalty is not above 0, or a target is always the same.
    """
    x, y = _checked(x, y)
    if not l2 > 0:
        raise SiteError(f"the penalty of a logistic probe is {l2}; give more than 0.")
    share = y.mean(axis=0)
    if bool(((share <= 0) | (share >= 1)).any()):
        raise SiteError(
            f"target {int(jnp.argmax((share <= 0) | (share >= 1)))} is the same in all {len(y)} rows, so "
            "nothing separates them; give rows of both kinds."
        )
    return _logistic(x, y, jnp.float32(l2), steps, targets_at_once)


@jax.jit
def _ridge(x: Array, y: Array, l2: Array) -> Probe:
    mean, middle = x.mean(axis=0), y.mean(axis=0)
    left, sizes, right = jnp.linalg.svd(x - mean[None], full_matrices=False)
    real = sizes > sizes[0] * max(x.shape) * jnp.finfo(jnp.float32).eps
    shrunk = jnp.where(real, sizes / jnp.where(real, jnp.square(sizes) + l2, 1.0), 0.0)
    along = jnp.matmul(left.T, y - middle[None], precision="highest") * shrunk[:, None]
    weights = jnp.matmul(right.T, along, precision="highest")
    return Probe(weights, middle - jnp.matmul(mean, weights, precision="highest"))


@partial(jax.jit, static_argnames=("steps", "at_once"))
def _logistic(x: Array, y: Array, l2: Array, steps: int, at_once: int) -> Probe:
    rows, width = x.shape
    mean = x.mean(axis=0)  # about the mean, slope and intercept hardly interact
    design = jnp.concatenate([x - mean[None], jnp.ones((rows, 1))], axis=1)
    penalty = jnp.full(width + 1, l2).at[-1].set(0.0)

    def loss(beta: Array, target: Array) -> Array:
        z = jnp.matmul(design, beta, precision="highest")
        return (jax.nn.softplus(z) - target * z).sum() + 0.5 * (penalty * jnp.square(beta)).sum()

    def fit(target: Array) -> Array:
        def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            beta, number, _ = state
            p = jax.nn.sigmoid(jnp.matmul(design, beta, precision="highest"))
            slope = jnp.matmul(p - target, design, precision="highest") + penalty * beta
            curved = design * (p * (1 - p))[:, None]
            hessian = jnp.matmul(design.T, curved, precision="highest") + jnp.diag(penalty + 1e-6)
            step = jax.scipy.linalg.solve(hessian, slope, assume_a="pos")
            sizes = 0.5 ** jnp.arange(8, dtype=jnp.float32)
            tried = jax.vmap(lambda size: loss(beta - size * step, target))(sizes)
            # The longest step that does not go up; near the solution rounding decides, and any will do.
            now = loss(beta, target)
            good = tried <= now + 1e-6 * jnp.abs(now)
            size = jnp.where(good.any(), sizes[jnp.argmax(good)], 0.0)
            moved = jnp.abs(size * step).max() > 1e-6 * jnp.maximum(jnp.abs(beta).max(), 1e-3)
            return beta - size * step, number + 1, moved

        def going(state: tuple[Array, Array, Array]) -> Array:
            return state[2] & (state[1] < steps)

        return jax.lax.while_loop(going, newton, (jnp.zeros(width + 1), jnp.int32(0), jnp.bool_(True)))[0]

    beta = map_pieces(fit, y.T, at_once).T
    return Probe(beta[:-1], beta[-1] - jnp.matmul(mean, beta[:-1], precision="highest"))


def _checked(x: Any, y: Any) -> tuple[Array, Array]:
    x, y = jnp.asarray(x).astype(jnp.float32), jnp.asarray(y).astype(jnp.float32)
    shape = list(y.shape)
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise SiteError(
            f"activations of shape {list(x.shape)} and targets of shape {shape} do not fit together; "
            "expected [rows, width] with 2 rows or more, and one target or row of targets for each."
        )
    return x, y
