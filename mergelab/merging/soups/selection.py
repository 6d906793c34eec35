"""Selection rules: which of two score sheets is better, over one metric or several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from mergelab.errors import EvaluationError
from mergelab.merging.soups.scores import Scores

__all__ = ["Guarded", "Lexicographic", "Metric", "Selection", "WeightedSum", "as_selection"]

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class Metric:
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


class Selection(Protocol):
    """Orders score sheets, and may refuse one outright."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics the rule reads; an evaluator must return all of them."""
        ...

    def worth(self, scores: Scores) -> tuple[float, ...]:
        """The sheet's value: larger is better, compared left to right."""
        ...

    def objection(self, scores: Scores, reference: Scores) -> str | None:
        """Why a sheet is refused whatever its worth (`reference`: the best single model's), or None."""
        ...


def _metric(given: str | Metric) -> Metric:
    """A metric, or the name of one whose larger values are better."""
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return Metric(given)
    raise EvaluationError(f"A selection rule has {given!r} where a metric or its name was expected.")


def _pairs(given: Iterable[tuple[str | Metric, float]], what: str) -> tuple[tuple[Metric, float], ...]:
    """Metrics with a number each."""
    found: list[tuple[Metric, float]] = []
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

    metrics: tuple[Metric, ...]

    def __post_init__(self) -> None:
        given = (self.metrics,) if isinstance(self.metrics, str | Metric) else self.metrics
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
class WeightedSum:
    """The sum of `weight * worth` over metrics or their names; `worth` is negated for metrics to minimise."""

    terms: tuple[tuple[Metric, float], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise EvaluationError("A selection rule needs at least one metric; none was given.")
        object.__setattr__(self, "terms", _pairs(self.terms, "weight"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
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

    rule: Selection
    limits: tuple[tuple[Metric, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", as_selection(self.rule))
        object.__setattr__(self, "limits", _pairs(self.limits, "limit"))
        for metric, limit in self.limits:
            if not limit >= 0:
                raise EvaluationError(f"The limit on {metric.name!r} is {limit}; expected 0 or more.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
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


def as_selection(rule: str | Metric | Selection) -> Selection:
    """Returns a rule for a metric's name (larger is better), a `Metric`, or a rule itself.

    Raises:
        EvaluationError: it is none of these.
    """
    if isinstance(rule, str | Metric):
        return Lexicographic((_metric(rule),))
    if not all(hasattr(rule, name) for name in ("metrics", "worth", "objection")):
        raise EvaluationError(f"{rule!r} is no selection rule; give a metric, its name, or a rule of them.")
    return rule
