"""Score sheets, and which of two candidates is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, SupportsFloat

from mergelab.errors import EvaluationError, did_you_mean

__all__ = [
    "Guarded",
    "Lexicographic",
    "Objective",
    "Scores",
    "SoupSelection",
    "WeightedScores",
    "as_selection",
    "call_evaluator",
    "read_scores",
]


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


Direction = Literal["max", "min"]


@dataclass(frozen=True)
class Objective:
    """A metric's name and which way is better.

    Raises:
        EvaluationError: `direction` is neither `max` nor `min`.
    """

    name: str
    direction: Direction = "max"

    def __post_init__(self) -> None:
        if self.direction not in ("max", "min"):
            raise EvaluationError(
                f"Metric {self.name!r} has direction {self.direction!r}; expected 'max' or 'min'."
            )

    def worth(self, scores: Scores) -> float:
        """Returns the metric's value, negated if smaller is better, so that larger is always better."""
        return scores[self.name] if self.direction == "max" else -scores[self.name]

    def __str__(self) -> str:
        return f"{self.direction} {self.name}"


class SoupSelection(Protocol):
    """Orders score sheets, and may refuse one outright."""

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics the rule reads; an evaluator must return all of them."""
        ...

    def worth(self, scores: Scores) -> tuple[float, ...]:
        """The sheet's value: larger is better, compared left to right."""
        ...

    def objection(self, scores: Scores, reference: Scores) -> str | None:
        """Why a sheet is refused whatever its worth (`reference`: the best single model's), or None."""
        ...


def _metric(given: str | Objective) -> Objective:
    """A metric, or the name of one whose larger values are better."""
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        return Objective(given)
    raise EvaluationError(f"A selection rule has {given!r} where a metric or its name was expected.")


def _pairs(given: Iterable[tuple[str | Objective, float]], what: str) -> tuple[tuple[Objective, float], ...]:
    """Metrics with a number each."""
    found: list[tuple[Objective, float]] = []
    for pair in given:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], int | float):
            raise EvaluationError(f"A selection rule has {pair!r} where (metric, {what}) was expected.")
        found.append((_metric(pair[0]), pair[1]))
    return tuple(found)


@dataclass(frozen=True)
class Lexicographic:
    """The first metric decides; each next one only where all before it are equal.

    Metrics may be given by name, where larger is better.
    """

    metrics: tuple[Objective, ...]

    def __post_init__(self) -> None:
        given = (self.metrics,) if isinstance(self.metrics, str | Objective) else self.metrics
        if not given:
            raise EvaluationError("A selection rule needs at least one metric; none was given.")
        object.__setattr__(self, "metrics", tuple(map(_metric, given)))

    def worth(self, scores: Scores) -> tuple[float, ...]:
        return tuple(metric.worth(scores) for metric in self.metrics)

    def objection(self, scores: Scores, reference: Scores) -> str | None:
        return None

    def __str__(self) -> str:
        return ", then ".join(map(str, self.metrics))


@dataclass(frozen=True)
class WeightedScores:
    """The sum of `weight * worth` over metrics or their names; `worth` is negated for metrics to minimize."""

    terms: tuple[tuple[Objective, float], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise EvaluationError("A selection rule needs at least one metric; none was given.")
        object.__setattr__(self, "terms", _pairs(self.terms, "weight"))

    @property
    def metrics(self) -> tuple[Objective, ...]:
        return tuple(metric for metric, _ in self.terms)

    def worth(self, scores: Scores) -> tuple[float, ...]:
        return (sum(weight * metric.worth(scores) for metric, weight in self.terms),)

    def objection(self, scores: Scores, reference: Scores) -> str | None:
        return None

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} * {metric}" for metric, weight in self.terms)


@dataclass(frozen=True)
class Guarded:
    """Another rule (or a metric), with limits on how far metrics may fall below the best single model's.

    The reference is the best single model and not the previous soup, so that many small losses cannot add
    up to more than the limit.
    """

    rule: SoupSelection
    limits: tuple[tuple[Objective, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", as_selection(self.rule))
        object.__setattr__(self, "limits", _pairs(self.limits, "limit"))
        for metric, limit in self.limits:
            if not limit >= 0:
                raise EvaluationError(f"The limit on {metric.name!r} is {limit}; expected 0 or more.")

    @property
    def metrics(self) -> tuple[Objective, ...]:
        guards = tuple(metric for metric, _ in self.limits)
        return self.rule.metrics + tuple(m for m in guards if m not in self.rule.metrics)

    def worth(self, scores: Scores) -> tuple[float, ...]:
        return self.rule.worth(scores)

    def objection(self, scores: Scores, reference: Scores) -> str | None:
        for metric, limit in self.limits:
            loss = metric.worth(reference) - metric.worth(scores)
            if loss > limit:
                return (
                    f"{metric.name} {scores[metric.name]:.6g} is {loss:.3g} worse than the best single "
                    f"model's {reference[metric.name]:.6g} (limit {limit:g})"
                )
        return self.rule.objection(scores, reference)

    def __str__(self) -> str:
        limits = ", ".join(f"{metric.name} at most {limit:g} worse" for metric, limit in self.limits)
        return f"{self.rule} ({limits})"


def as_selection(rule: str | Objective | SoupSelection) -> SoupSelection:
    """Returns a rule for a metric's name (larger is better), a `Objective`, or a rule itself.

    Raises:
        EvaluationError: it is none of these.
    """
    if isinstance(rule, str | Objective):
        return Lexicographic((_metric(rule),))
    if not all(hasattr(rule, name) for name in ("metrics", "worth", "objection")):
        raise EvaluationError(
            f"{rule!r} is not a selection rule; give a metric, its name, or a rule of them."
        )
    return rule
