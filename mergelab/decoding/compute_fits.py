"""Accuracy as a line over the logarithm of compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mergelab.decoding.transforms import require

__all__ = ["LogComputeFit", "fit_log_compute"]


@dataclass(frozen=True)
class LogComputeFit:
    """`accuracy = intercept + per_doubling * log2(compute)`.

    Attributes:
        intercept: accuracy at a compute of 1.
        per_doubling: accuracy that twice the compute adds.
        r_squared: share of the variance that the line explains; NaN where accuracies are all equal.
        standard_error: standard error of `per_doubling`; NaN for two points.
    """

    intercept: float
    per_doubling: float
    r_squared: float
    standard_error: float

    def at(self, compute: float) -> float:
        """The accuracy at a compute, kept between 0 and 1."""
        require("compute", compute, 0 < compute < math.inf, "a positive number")
        return min(max(self.intercept + self.per_doubling * math.log2(compute), 0.0), 1.0)

    def compute_for(self, accuracy: float) -> float:
        """The compute at which the line reaches an accuracy; infinite where more compute does not help."""
        require("accuracy", accuracy, 0 <= accuracy <= 1, "a probability")
        if self.per_doubling <= 0:
            return math.inf
        exponent = (accuracy - self.intercept) / self.per_doubling
        return 2.0**exponent if exponent < 1000 else math.inf


def fit_log_compute(
    compute: ArrayLike, accuracy: ArrayLike, weights: ArrayLike | None = None
) -> LogComputeFit:
    """The line of least squares through accuracies over `log2(compute)`.

    A line has no ceiling: where accuracy saturates, or falls, fit the part before that.

    Args:
        compute: tokens, FLOPs or dollars, positive, at least two different ones.
        accuracy: accuracy at each.
        weights: weight of each, such as its number of tasks; equal ones if None.

    Raises:
        DecodingError: numbers that do not fit together, or only one compute.
    """
    x, y = (np.asarray(values, np.float64).reshape(-1) for values in (compute, accuracy))
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    require("fit_log_compute", [x.size, y.size, w.size], x.size == y.size == w.size, "as many of each")
    positive = bool((np.isfinite(x) & (x > 0)).all() and (np.isfinite(w) & (w > 0)).all())
    require("fit_log_compute(compute)", x.tolist()[:8], positive, "positive numbers and weights")
    require("fit_log_compute(compute)", x.tolist()[:8], np.unique(x).size >= 2, "two different ones at least")
    finite = bool(np.isfinite(y).all())
    require("fit_log_compute(accuracy)", y.tolist()[:8], finite, "finite numbers")
    log = np.log2(x)
    mean_x, mean_y = np.average(log, weights=w), np.average(y, weights=w)
    spread = float((w * np.square(log - mean_x)).sum())
    slope = float((w * (log - mean_x) * (y - mean_y)).sum()) / spread
    left = y - mean_y - slope * (log - mean_x)
    total, rest = (float((w * np.square(part)).sum()) for part in (y - mean_y, left))
    free = x.size - 2
    error = math.sqrt(rest / free / spread) if free > 0 else math.nan
    r_squared = 1 - rest / total if total > 0 else math.nan
    return LogComputeFit(float(mean_y - slope * mean_x), slope, r_squared, error)
