"""The merges that are timed: a recipe each, the inputs it reads, and the speed aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "Case"]

SIBLINGS = ("first", "second", "third")


@dataclass(frozen=True)
class Case:
    """One timed merge.

    Attributes:
        method: the recipe's `merge_method`, and the case's name.
        models: the models it lists, the base not among them.
        base: whether it names the base model.
        aim: seconds aimed at, start-up apart, as a multiple of the floor's or of another case's.
        per_model: parameters set on every listed model.
        shared: parameters set once.
        against: the case that `aim` is a multiple of; the floor where there is none.
    """

    method: str
    models: Sequence[str]
    base: bool
    aim: float
    per_model: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every model it reads."""
        return (*(("base",) if self.base else ()), *self.models)

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain data; model paths are relative to the family's folder."""
        listed = [{"model": name, "parameters": dict(self.per_model)} for name in self.models]
        if self.method == "slerp":  # counts its base among the two models it lists
            listed = [{"model": "base"}, *listed]
        return {
            "merge_method": self.method,
            "models": listed,
            **({"base_model": "base"} if self.base else {}),
            "parameters": dict(self.shared),
            "dtype": "bfloat16",
        }


_THIRD = {"weight": 1 / 3}
_SPARSE = {"weight": 1 / 3, "density": 0.5}

CASES: Mapping[str, Case] = {
    case.method: case
    for case in (
        Case("passthrough", SIBLINGS[:1], base=False, aim=1.4),
        Case("linear", SIBLINGS, base=False, aim=1.4, per_model=_THIRD),
        Case("task_arithmetic", SIBLINGS, base=True, aim=1.4, per_model=_THIRD),
        Case("slerp", SIBLINGS[:1], base=True, aim=2, shared={"t": 0.5}),
        Case("karcher", SIBLINGS, base=False, aim=3),
        Case("multislerp", SIBLINGS, base=False, aim=3, per_model=_THIRD),
        Case("model_stock", SIBLINGS, base=True, aim=3),
        Case("dare_ties", SIBLINGS, base=True, aim=4.5, per_model=_SPARSE),
        Case("breadcrumbs", SIBLINGS, base=True, aim=4.5, per_model=_SPARSE),
        Case("ties", SIBLINGS, base=True, aim=4.5, per_model=_SPARSE),
        Case("della", SIBLINGS, base=True, aim=8, per_model=_SPARSE),
        Case("iso_c", SIBLINGS, base=True, aim=20, against="linear"),
        Case("tsv_m", SIBLINGS, base=True, aim=60, against="linear"),
    )
}
