"""The guard knows a bad start from a training that gets worse."""

from __future__ import annotations

import math

import pytest

from mergelab.sae.training.divergence import DivergenceGuard


def first_diverged(start: float, errors: list[float]) -> int | None:
    """The index of the figure at which a training is ended."""
    guard = DivergenceGuard(start)
    return next((i for i, error in enumerate(errors) if guard.diverged({"nmse": error, "loss": 1.0})), None)


@pytest.mark.parametrize(
    ("start", "errors", "ended"),
    [
        (1.0, [0.9, 0.3, 0.1], None),
        (40.0, [38.0, 33.5, 12.0, 2.0, 0.4, 0.14], None),  # a dense variant on narrow rows
        (40.0, [45.0, 60.0, 41.0, 3.0], None),  # which may rise while the rate warms up
        (1.0, [0.5, 9.0, 0.5], None),  # a batch of outliers
        (1.0, [0.5, 11.0], 1),
        (40.0, [38.0, 0.2, 11.0], 2),  # worse than it was, though better than it began
        (40.0, [121.0], 0),
        (40.0, [5.0, 14.0, 16.0], 2),
        (1.0, [math.nan], 0),
        (1.0, [math.inf], 0),
        (math.nan, [11.0], 0),
        (math.inf, [9.0, 28.0], 1),
    ],
    ids=range(12),
)
def test_an_error_is_compared_with_the_lowest_so_far(
    start: float, errors: list[float], ended: int | None
) -> None:
    assert first_diverged(start, errors) == ended


def test_any_figure_that_is_not_finite_ends_a_training() -> None:
    assert DivergenceGuard(1.0).diverged({"nmse": 0.5, "loss": math.nan})
