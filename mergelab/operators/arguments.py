"""Checks the hyper-parameters of a call against what the operator declares, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import OperatorError, did_you_mean
from mergelab.operators.hyper import is_concrete

if TYPE_CHECKING:
    from mergelab.operators.declare import Operator, Parameter

__all__ = ["check_arguments"]


def check_arguments(operator: Operator, arguments: Mapping[str, Any]) -> None:
    """Checks names, choices and ranges; traced values are taken as they are.

    Raises:
        OperatorError: a parameter is unknown, missing, out of its range or none of its choices.
    """
    declared = {parameter.keyword: parameter for parameter in operator.parameters}
    for keyword, value in arguments.items():
        if keyword not in declared:
            takes = f"it takes {', '.join(declared)}" if declared else "it takes none"
            raise OperatorError(
                f"{operator.name}: unknown parameter {keyword!r}{did_you_mean(keyword, declared)}; {takes}."
            )
        _check_value(operator.name, declared[keyword], value)
    missing = [p.keyword for p in operator.parameters if p.required and p.keyword not in arguments]
    if missing:
        first = missing[0]
        raise OperatorError(f"{operator.name}: parameter {first!r} has no default; pass `{first}=...`.")


def _check_value(operator: str, parameter: Parameter, value: Any) -> None:
    where = f"{operator}: parameter {parameter.name!r} is {value!r}, but"
    if parameter.choices:
        if value not in parameter.choices:
            known = ", ".join(map(repr, parameter.choices))
            near = did_you_mean(value, parameter.choices) if isinstance(value, str) else ""
            raise OperatorError(f"{where} it must be one of {known}{near}.")
    elif parameter.type in (int, float) and not (value is None and parameter.optional) and is_concrete(value):
        # An optional per-model value may be None in the sequence of a recipe.
        for one in np.ravel(np.asarray(value, dtype=object)):
            if not (one is None and parameter.optional):
                _check_number(where, parameter, one)


def _check_number(where: str, parameter: Parameter, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OperatorError(f"{where} it must be a number{_per_model(parameter)}.") from None
    if not math.isfinite(number):
        raise OperatorError(f"{where} it must be finite.")
    if not parameter.low <= number <= parameter.high:
        raise OperatorError(f"{where} it must lie between {parameter.low:g} and {parameter.high:g}.")


def _per_model(parameter: Parameter) -> str:
    return ", or a sequence of one number per model" if parameter.per_model else ""
