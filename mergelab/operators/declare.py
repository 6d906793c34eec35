"""What a named operator declares of itself, read off the signature of the function that builds it.

A recipe, the CLI help, the documentation table and the law-suite all read this one declaration, so an
option is stated once: as a keyword argument of the builder. Arguments are checked against it before anything
is built, and normalized to pytree leaves.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mergelab.errors import OperatorError, did_you_mean
from mergelab.operators.compose import BaseUse, Inputs, IntegerUse, Merge
from mergelab.operators.statistics import StatisticsKind

__all__ = [
    "REQUIRED",
    "Absent",
    "HyperParameter",
    "Lone",
    "OneOfModels",
    "Operator",
    "PerModel",
    "Range",
    "Shares",
    "exact",
    "is_concrete",
    "operator",
    "total_weight",
    "weights",
]


def is_concrete(*values: Any) -> bool:
    """Whether none of the values is being traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def weights(values: Any) -> Any:
    """A float32 scalar or vector: what is only ever used in float32 arithmetic."""
    if is_concrete(values):
        return np.asarray(values, np.float32)
    if isinstance(values, (list, tuple)):
        return jnp.stack([jnp.asarray(v, jnp.float32) for v in values])
    return jnp.asarray(values, jnp.float32)


def exact(values: Any) -> Any:
    """A fraction that is also counted with: Python floats are kept, sequences become tuples."""
    return tuple(values) if isinstance(values, list) else values


def total_weight(values: Any) -> float:
    """The sum of concrete weights as float32 arithmetic sees it; 1.0 for a traced value."""
    if not is_concrete(values):
        return 1.0
    return float(np.sum(np.atleast_1d(np.asarray(values, np.float32)), dtype=np.float32))


class _Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()

Lone = Literal["refuse", "copy", "base"]
"""What becomes of a tensor that fewer models have than the operator merges: an error, a copy of the one there
is, or a copy of the base's."""

Absent = Literal["refuse", "copy", "omit"]
"""What becomes of a tensor that the base lacks where differences from it are wanted: an error, a copy of the
only model's that has it, or nothing: the output lacks it too."""

Clips = Literal["neither", "low", "high", "both"]
"""The bounds beyond which a recipe's value is taken for the bound itself."""

Shares = Literal["normalize", "always", "elected"]
"""When models enter by their share of all weights: if `normalize` is set, always, or, if it is set, by their
share of the weights that won an election (which then cannot exceed 1)."""


@dataclass(frozen=True)
class PerModel:
    """Annotation mark: one value per non-base model (a recipe may set it on each model)."""


@dataclass(frozen=True)
class Range:
    """Annotation mark: the closed interval a value must lie in.

    A recipe may go beyond a bound that `clips` names, where mergekit's arithmetic makes of it what it makes
    of the bound.
    """

    low: float = float("-inf")
    high: float = float("inf")
    clips: Clips = "neither"


@dataclass(frozen=True)
class OneOfModels:
    """Annotation mark: the position of one of the models; a recipe may write the model's name."""


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter of a named operator.

    Attributes:
        name: its name in a recipe (`lambda`, not `lambda_`).
        keyword: its name as a keyword argument of the builder.
        per_model: True if it has one value per non-base model, False if it is shared.
        type: `float`, `int`, `bool` or `str`: what a recipe value must be.
        choices: the valid values of a `str`, else empty.
        clips: the bounds beyond which a recipe's value is taken for the bound itself.
        default: the default value, or `REQUIRED`.
        low, high: the closed range of valid values.
        optional: True if `None` is a valid value.
        one_of_models: True if the value is the position of one of the models, which a recipe may name.
    """

    name: str
    keyword: str
    per_model: bool
    type: type
    default: Any
    low: float
    high: float
    optional: bool
    choices: tuple[str, ...] = ()
    clips: Clips = "neither"
    one_of_models: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def clipped(self, value: float) -> float:
        """The value, or the bound beyond which it lies if that clips."""
        if value < self.low and self.clips in ("low", "both"):
            return self.low
        return self.high if value > self.high and self.clips in ("high", "both") else value


@dataclass(frozen=True)
class Operator:
    """A named merge operator: call it with hyper-parameters to get a `Merge`.

    Attributes:
        name: the name recipes use.
        summary: one sentence.
        base: whether a base model is `required`, `optional`, or `as_input` (the base, if a recipe names
            one, is one more ordinary input and needs its per-model parameters).
        min_models, max_models: how many models it takes besides the base (`max_models` None: any number).
        reference: the paper or program that defines it.
        helps: what it is for, after its paper and experiments here.
        parameters: its hyper-parameters, in signature order.
        lone: the treatment of a tensor that too few models have.
        absent: the treatment of a tensor that the base lacks.
        integers: the treatment of tensors that are not floating point.
        copies_unless: the parameter without which the operator copies its one model, bits and packed formats
            as they are; None if it always computes.
        strength: the parameter that says how strongly models enter.
        shares: when models enter by their share of all `strength`.
        statistics: the kind of statistics it needs beside each model (`statistics.StatisticsKind`), or None.
    """

    name: str
    summary: str
    base: BaseUse
    min_models: int
    max_models: int | None
    reference: str
    helps: str
    parameters: tuple[HyperParameter, ...]
    build: Callable[..., Merge]
    lone: Lone = "refuse"
    absent: Absent = "refuse"
    integers: IntegerUse = "equal"
    copies_unless: str | None = None
    strength: str = "weight"
    shares: Shares = "normalize"
    statistics: StatisticsKind | None = None

    def __call__(self, **hyper_parameters: Any) -> Merge:
        """Returns the merge with these hyper-parameters; per-model ones are sequences, or one value for all.

        Raises:
            OperatorError: a parameter is unknown, missing, out of its range or none of its choices.
        """
        _check_arguments(self, hyper_parameters)
        inputs = Inputs(
            self.name, self.base, self.min_models, self.max_models, self.integers, self.statistics
        )
        return dataclasses.replace(self.build(**hyper_parameters), inputs=inputs)

    def copies(self, hyper_parameters: Mapping[str, Any]) -> bool:
        """Whether the merge with these hyper-parameters is a plain copy of its one model."""
        if self.copies_unless is None:
            return False
        value = hyper_parameters.get(self.copies_unless)
        return value is None or (isinstance(value, list | tuple) and all(one is None for one in value))

    def parameter(self, name: str) -> HyperParameter | None:
        """The parameter a recipe calls `name`, or None."""
        return next((p for p in self.parameters if p.name == name), None)


def operator(
    *,
    base: BaseUse,
    min_models: int = 1,
    max_models: int | None = None,
    reference: str,
    helps: str = "",
    lone: Lone = "refuse",
    absent: Absent = "refuse",
    integers: IntegerUse = "equal",
    copies_unless: str | None = None,
    strength: str = "weight",
    shares: Shares = "normalize",
    statistics: StatisticsKind | None = None,
) -> Callable[[Callable[..., Merge]], Operator]:
    """Decorator: turns a builder function into a named `Operator` by reading its signature.

    Keyword arguments annotated `Annotated[type, PerModel(), Range(...)]` are per-model; all others shared.
    A trailing underscore in a keyword (`lambda_`) is dropped from the recipe's spelling. What the decorator
    itself takes is what `Operator` documents: all that planning and streaming a merge need to know of it.
    """

    def declare(build: Callable[..., Merge]) -> Operator:
        hints = typing.get_type_hints(build, include_extras=True)
        parameters = tuple(
            _parameter(keyword, hints[keyword], p.default)
            for keyword, p in inspect.signature(build).parameters.items()
        )
        summary = (inspect.getdoc(build) or "").split("\n", 1)[0]
        name = build.__name__
        declared = Operator(
            name,
            summary,
            base,
            min_models,
            max_models,
            reference,
            helps,
            parameters,
            build,
            lone,
            absent,
            integers,
            copies_unless,
            strength,
            shares,
            statistics,
        )
        object.__setattr__(declared, "__doc__", build.__doc__)
        return declared

    return declare


def _parameter(keyword: str, hint: Any, default: Any) -> HyperParameter:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        marks = tuple(rest)
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices, hint = typing.get_args(hint), str
    options = typing.get_args(hint)
    optional = type(None) in options
    plain = next((o for o in options if o is not type(None)), hint) if options else hint
    bounds = next((m for m in marks if isinstance(m, Range)), Range())
    return HyperParameter(
        name=keyword.rstrip("_"),
        keyword=keyword,
        per_model=any(isinstance(m, PerModel) for m in marks),
        type=plain if plain in (bool, int, str) else float,
        default=REQUIRED if default is inspect.Parameter.empty else default,
        low=bounds.low,
        high=bounds.high,
        optional=optional,
        choices=choices,
        clips=bounds.clips,
        one_of_models=any(isinstance(m, OneOfModels) for m in marks),
    )


def _check_arguments(operator: Operator, arguments: Mapping[str, Any]) -> None:
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


def _check_value(operator: str, parameter: HyperParameter, value: Any) -> None:
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


def _check_number(where: str, parameter: HyperParameter, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OperatorError(f"{where} it must be a number{_per_model(parameter)}.") from None
    if not math.isfinite(number):
        raise OperatorError(f"{where} it must be finite.")
    if not parameter.low <= number <= parameter.high:
        raise OperatorError(f"{where} it must lie between {parameter.low:g} and {parameter.high:g}.")


def _per_model(parameter: HyperParameter) -> str:
    return ", or a sequence of one number per model" if parameter.per_model else ""
