"""Hyper-parameters of one output tensor, looked up through a recipe's scopes as mergekit does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergelab.errors import RecipeError, quoted
from mergelab.merging.scopes import Scope, ScopedSlice, Source
from mergelab.merging.setting import Scalar, Unset
from mergelab.operators.declare import Operator, Parameter

__all__ = ["IGNORED", "convert", "model_scope_read", "resolve", "value_fault"]

IGNORED = frozenset({"int8_mask"})
"""Parameters that mergekit recipes carry and that change no number here (masks are one byte anyway)."""


def model_scope_read(operator: Operator, parameter: Parameter) -> bool:
    """Whether a model's own `parameters` are searched: for per-model ones, and where there is one model."""
    return parameter.per_model or (operator.base == "as_input" and operator.max_models == 1)


def resolve(
    operator: Operator,
    piece: ScopedSlice,
    inputs: Sequence[tuple[Source, str]],
    output_name: str,
    t: float,
) -> dict[str, Any]:
    """The keyword arguments for `operator`, for one output tensor.

    Args:
        operator: the merge method.
        piece: the slice the tensor belongs to.
        inputs: the models that have the tensor, and their names for it (filters of per-model parameters
            look at these; filters of shared ones at `output_name`).
        output_name: the output tensor's name.
        t: the layer coordinate in [0, 1].

    Returns:
        Scalars for shared parameters, one list entry per input for per-model ones; parameters that no scope
        sets keep the operator's default.

    Raises:
        RecipeError: a required parameter that no scope sets for this tensor.
    """
    found: dict[str, Any] = {}
    for parameter in operator.parameters:
        if not parameter.per_model:
            scopes, name = piece.shared, output_name
            if model_scope_read(operator, parameter):
                scopes, name = (inputs[0][0].parameters, *piece.shared), inputs[0][1]
            value = _first(scopes, parameter.name, name, t)
            if isinstance(value, Unset):
                if parameter.required:
                    raise RecipeError(_unset(operator, parameter, output_name, ""))
                continue
            found[parameter.keyword] = convert(parameter, value)
            continue
        values = [_first((s.parameters, *piece.shared), parameter.name, name, t) for s, name in inputs]
        for (source, name), value in zip(inputs, values, strict=True):
            if isinstance(value, Unset) and parameter.required:
                raise RecipeError(_unset(operator, parameter, name, f" of model {source.model!r}"))
        if not all(isinstance(value, Unset) for value in values):
            found[parameter.keyword] = [
                parameter.default if isinstance(value, Unset) else convert(parameter, value)
                for value in values
            ]
    return found


def _first(scopes: Iterable[Scope], name: str, tensor_name: str, t: float) -> Scalar | Unset:
    for scope in scopes:
        if name in scope:
            value = scope[name].evaluate(tensor_name, t)
            if not isinstance(value, Unset):
                return value
    return Unset()


def _unset(operator: Operator, parameter: Parameter, tensor_name: str, whose: str) -> str:
    return (
        f"tensor {tensor_name!r}{whose}: no filter of {parameter.name!r} matches it and {operator.name!r} "
        "has no default: add an entry without a filter"
    )


def convert(parameter: Parameter, value: Scalar) -> Any:
    """A checked scalar as the type the operator declares; None stays None.

    Raises:
        RecipeError: an interpolated value is not whole where a whole number is needed.
    """
    if value is None:
        return None
    if parameter.type is int and float(value) != int(float(value)):
        raise RecipeError(
            f"parameter {parameter.name!r} must be whole, but a gradient gives {value!r}: write one value"
        )
    return parameter.type(value)


def value_fault(parameter: Parameter, value: Scalar) -> str | None:
    """What is wrong with a value as written, or None."""
    if value is None:
        return None if parameter.optional else f"has no value: {_expected(parameter)} is needed"
    if parameter.type is bool:
        fine = isinstance(value, bool | int | float) and value in (0, 1)
        hint = ": write true or false" if str(value).lower() in ("yes", "no", "on", "off") else ""
        return None if fine else f"expected true or false, found {quoted(value)}{hint}"
    if parameter.type is str:
        return None if isinstance(value, str) else f"expected a word, found {quoted(value)}"
    if isinstance(value, bool | str) or not _is_finite(value):
        return f"expected {_expected(parameter)}, found {quoted(value)}"
    if parameter.type is int and value != int(value):
        return f"expected {_expected(parameter)}, found {quoted(value)}"
    if not parameter.low <= float(value) <= parameter.high:
        return f"{quoted(value)} is out of range: expected {_expected(parameter)}"
    return None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _expected(parameter: Parameter) -> str:
    kinds: Mapping[type, str] = {bool: "true or false", int: "a whole number", str: "a word"}
    kind = kinds.get(parameter.type, "a number")
    low, high = parameter.low, parameter.high
    if low > float("-inf") and high < float("inf"):
        return f"{kind} from {low:g} to {high:g}"
    if low > float("-inf"):
        return f"{kind} >= {low:g}"
    return f"{kind} <= {high:g}" if high < float("inf") else kind
