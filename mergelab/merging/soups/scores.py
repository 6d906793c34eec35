"""What an evaluator returned, read into finite numbers by metric name, or a clear error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

from mergelab.errors import EvaluationError, did_you_mean

__all__ = ["Scores", "call_evaluator", "read_scores"]

Scores = Mapping[str, float]
"""Metric values by name."""


def call_evaluator(
    evaluate: Callable[[Any], Any], argument: Any, *, who: str, metrics: Sequence[str], required: bool = True
) -> dict[str, float]:
    """Returns `read_scores(evaluate(argument))`.

    Raises:
        EvaluationError: the evaluator raised (its exception is the cause), or as `read_scores`.
    """
    try:
        raw = evaluate(argument)
    except EvaluationError as error:
        raise EvaluationError(f"Evaluating {who} failed: {error}") from error
    except Exception as error:
        raise EvaluationError(f"Evaluating {who} failed with {type(error).__name__}: {error}") from error
    return read_scores(raw, who=who, metrics=metrics, required=required)


def read_scores(raw: Any, *, who: str, metrics: Sequence[str], required: bool = True) -> dict[str, float]:
    """Returns the evaluator's numbers by metric name.

    Args:
        raw: a number (named after the one metric in use) or a mapping of metric name to number; entries of
            a mapping that are not numbers (a model's name, a list) are left out.
        who: the candidate or soup, for messages.
        metrics: the metrics the selection rule reads; the first also names a bare number.
        required: whether all of `metrics` must be present (a test evaluator may report others).

    Raises:
        EvaluationError: a metric is missing, not a number, or NaN or infinite; or a bare number came where
            several metrics are needed.
    """
    if not isinstance(raw, Mapping):
        if required and len(metrics) > 1:
            raise EvaluationError(
                f"The evaluator returned {raw!r} for {who}, but the selection rule needs the metrics "
                f"{', '.join(metrics)}; return a mapping with all of them."
            )
        raw, required = {metrics[0]: raw}, True
    scores = {str(name): number for name, value in raw.items() if (number := _number(value)) is not None}
    for metric in metrics if required else scores or metrics[:1]:
        if metric not in raw:
            names = [str(name) for name in raw]
            raise EvaluationError(
                f"The evaluator returned no metric {metric!r} for {who}{did_you_mean(metric, names)}; "
                f"it returned {', '.join(names) or 'nothing'}: select by one of these, or return it."
            )
        if metric not in scores or not math.isfinite(scores[metric]):
            raise EvaluationError(
                f"Metric {metric!r} of {who} is {raw[metric]!r}; the evaluator must return a finite number "
                "(leave a diverged model out of the candidates)."
            )
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _number(value: Any) -> float | None:
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
