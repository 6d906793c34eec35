"""The law by which reconstruction error falls with latents and active latents, fitted to a sweep.

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)

The second term is what no number of latents explains (arXiv 2406.04093, section 3.1).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from mergelab.errors import SAEError

__all__ = ["ScalingLaw", "fit_scaling_law"]


@dataclass(frozen=True)
class ScalingLaw:
    """The law's coefficients, in the order of the formula."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float

    def __call__(self, n: np.ndarray | float, k: np.ndarray | float) -> np.ndarray:
        """Normalized error of SAEs of n latents with k active."""
        return np.exp(_log_terms(np.array(astuple(self)), np.log(n), np.log(k))).sum(axis=0)


def _log_terms(c: np.ndarray, ln_n: np.ndarray, ln_k: np.ndarray) -> np.ndarray:
    """The logarithms of both terms: `[2, points]`."""
    ln_n, ln_k = np.broadcast_arrays(ln_n, ln_k)
    return np.stack([c[0] + c[1] * ln_k + c[2] * ln_n + c[3] * ln_k * ln_n, c[4] + c[5] * ln_k])


def fit_scaling_law(n: np.ndarray, k: np.ndarray, loss: np.ndarray) -> ScalingLaw:
    """Least squares of the logarithm of the loss, the best of several starts.

    Args:
        n: `[points]`, latents.
        k: `[points]`, active latents.
        loss: `[points]`, above 0.

    Raises:
        SAEError: fewer than six points, fewer than two widths or three k, or a loss that is not above 0.
    """
    from scipy.optimize import least_squares

    n, k, loss = (np.asarray(part, np.float64) for part in (n, k, loss))
    if not len(n) == len(k) == len(loss) or len(n) < 6 or len(set(n)) < 2 or len(set(k)) < 3:
        raise SAEError(
            f"the law has six coefficients, but there are {len(loss)} losses of {len(set(n))} widths and "
            f"{len(set(k))} k; give at least six, of two widths and three k."
        )
    if not (loss > 0).all():
        raise SAEError(f"the loss at n={n[loss.argmin()]:g}, k={k[loss.argmin()]:g} is not above 0.")
    ln_n, ln_k, target = np.log(n), np.log(k), np.log(loss)

    def residuals(c: np.ndarray) -> np.ndarray:
        return np.logaddexp(*_log_terms(c, ln_n, ln_k)) - target

    def jacobian(c: np.ndarray) -> np.ndarray:
        terms = _log_terms(c, ln_n, ln_k)
        first, second = np.exp(terms - np.logaddexp(*terms))
        one = np.ones_like(ln_n)
        inner = np.stack([one, ln_k, ln_n, ln_k * ln_n], axis=1)
        return np.concatenate([first[:, None] * inner, second[:, None] * inner[:, :2]], axis=1)

    jac: Any = jacobian  # the stubs know its names only
    # The first term alone is linear in its coefficients; the floor starts below the smallest loss.
    inner = np.stack([np.ones_like(ln_n), ln_k, ln_n, ln_k * ln_n], axis=1)
    best = None
    for share in (0.03, 0.1, 0.3, 0.6):
        floor = share * loss.min()
        linear = np.linalg.lstsq(inner, np.log(loss - floor), rcond=None)[0]
        for slope in (0.0, -0.2):
            start = np.array([*linear, np.log(floor) - slope * ln_k.mean(), slope])
            found = least_squares(
                residuals, start, jac=jac, x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=2000
            )
            if best is None or found.cost < best.cost:
                best = found
    assert best is not None
    return ScalingLaw(*(float(c) for c in best.x))
