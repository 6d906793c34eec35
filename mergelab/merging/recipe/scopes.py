"""Models, slices and modules as one form; hyper-parameters resolved through their scopes and checked."""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mergelab.errors import RecipeError, did_you_mean, quoted, shortened
from mergelab.merging.recipe.faults import FieldPath
from mergelab.merging.recipe.schema import ModuleRecipe, Recipe
from mergelab.merging.recipe.settings import Scalar, Setting, Unset
from mergelab.operators import OPERATORS
from mergelab.operators.declare import HyperParameter, Operator

__all__ = [
    "IGNORED",
    "Scope",
    "ScopedSlice",
    "ScopedSource",
    "convert",
    "model_scope_read",
    "recipe_faults",
    "recipe_warnings",
    "resolve",
    "scoped_parts",
    "value_fault",
]


Scope = Mapping[str, Setting]


@dataclass(frozen=True)
class ScopedSource:
    """One input of a slice.

    Attributes:
        model: its reference, as the recipe writes it.
        layer_range: `(a, b)` for layers a to b - 1, or None for all of them.
        parameters: its own scope, read for per-model parameters only.
        path: its place in the recipe.
        statistics: the folder or file of its statistics, as the recipe writes it, or None.
    """

    model: str
    layer_range: tuple[int, int] | None
    parameters: Scope
    path: FieldPath
    statistics: str | None = None


@dataclass(frozen=True)
class ScopedSlice:
    """Consecutive output layers (or, in `models` form, the whole module) and how they are made.

    Attributes:
        inputs: the models merged, in recipe order; without the base, unless it counts as an input.
        base: the base model's source, or None.
        shared: the scopes below the models' own, first hit wins: slice, module, whole recipe.
        path: its place in the recipe.
    """

    inputs: tuple[ScopedSource, ...]
    base: ScopedSource | None
    shared: tuple[Scope, ...]
    path: FieldPath

    @property
    def sources(self) -> tuple[ScopedSource, ...]:
        """The inputs, then the base."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


def scoped_parts(recipe: Recipe, operator: Operator) -> dict[str | None, tuple[ScopedSlice, ...]]:
    """The slices of each module; a recipe without `modules` has the one key None.

    A base model that `models` does not list is appended; in a slice it is appended where the operator takes
    differences and all sources have the same layer range (otherwise its layers could not be known).
    """
    return {name: _slices(recipe, part, path, operator) for path, name, part in recipe.parts()}


def _slices(
    recipe: Recipe, part: ModuleRecipe, path: FieldPath, operator: Operator
) -> tuple[ScopedSlice, ...]:
    outer = (part.parameters, recipe.parameters)
    if part.models is not None:
        sources = [
            ScopedSource(model.model, None, model.parameters, (*path, "models", i), model.statistics)
            for i, model in enumerate(part.models)
        ]
        base = recipe.base_model
        if base is not None and all(source.model != base for source in sources):
            sources.append(ScopedSource(base, None, {}, ("base_model",)))
        return (_scoped(sources, base, outer, (*path, "models"), operator),)
    found = []
    for i, piece in enumerate(part.slices or ()):
        here = (*path, "slices", i)
        sources = [
            ScopedSource(s.model, s.layer_range, s.parameters, (*here, "sources", j), s.statistics)
            for j, s in enumerate(piece.sources)
        ]
        base = piece.base_model or recipe.base_model
        ranges = {source.layer_range for source in sources}
        absent = base is not None and all(source.model != base for source in sources)
        if base is not None and absent and operator.base != "as_input" and len(ranges) == 1:
            sources.append(ScopedSource(base, sources[0].layer_range, {}, here))
        found.append(_scoped(sources, base, (piece.parameters, *outer), here, operator))
    return tuple(found)


def _scoped(
    sources: list[ScopedSource],
    base: str | None,
    shared: tuple[Scope, ...],
    path: FieldPath,
    operator: Operator,
) -> ScopedSlice:
    if operator.base == "as_input":
        return ScopedSlice(tuple(sources), None, shared, path)
    inputs = tuple(source for source in sources if source.model != base)
    return ScopedSlice(inputs, next((s for s in sources if s.model == base), None), shared, path)


IGNORED = frozenset({"int8_mask"})
"""Parameters that mergekit recipes carry and that change no number here (masks are one byte anyway)."""


def model_scope_read(operator: Operator, parameter: HyperParameter) -> bool:
    """Whether a model's own `parameters` are searched: for per-model ones, and where there is one model."""
    return parameter.per_model or (operator.base == "as_input" and operator.max_models == 1)


def resolve(
    operator: Operator,
    piece: ScopedSlice,
    inputs: Sequence[tuple[ScopedSource, str]],
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
            if parameter.one_of_models and isinstance(value, str):
                value = position_of(value, [source.model for source, _ in inputs])
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


def position_of(name: str, models: Sequence[str]) -> int | None:
    """The position of the one model that is written so, or whose folder or file is called so; else None."""
    found = [i for i, model in enumerate(models) if name == model]
    found = found or [i for i, model in enumerate(models) if name == os.path.basename(model.rstrip("/"))]
    return found[0] if len(found) == 1 else None


def _first(scopes: Iterable[Scope], name: str, tensor_name: str, t: float) -> Scalar | Unset:
    for scope in scopes:
        if name in scope:
            value = scope[name].evaluate(tensor_name, t)
            if not isinstance(value, Unset):
                return value
    return Unset()


def _unset(operator: Operator, parameter: HyperParameter, tensor_name: str, whose: str) -> str:
    return (
        f"tensor {tensor_name!r}{whose}: no filter of {parameter.name!r} matches it and {operator.name!r} "
        "has no default: add an entry without a filter"
    )


def convert(parameter: HyperParameter, value: Scalar) -> Any:
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
    return parameter.type(value if isinstance(value, bool | str) else parameter.clipped(value))


def value_fault(parameter: HyperParameter, value: Scalar) -> str | None:
    """What is wrong with a value as written, or None."""
    if value is None:
        return None if parameter.optional else f"has no value: {_expected(parameter)} is needed"
    if parameter.type is bool:
        fine = isinstance(value, bool | int | float) and value in (0, 1)
        hint = ": write true or false" if str(value).lower() in ("yes", "no", "on", "off") else ""
        return None if fine else f"expected true or false, found {quoted(value)}{hint}"
    if parameter.type is str:
        return None if isinstance(value, str) else f"expected a word, found {quoted(value)}"
    if parameter.one_of_models and isinstance(value, str):
        return None
    if isinstance(value, bool | str) or not _is_finite(value):
        return f"expected {_expected(parameter)}, found {quoted(value)}"
    if parameter.type is int and value != int(value):
        return f"expected {_expected(parameter)}, found {quoted(value)}"
    if not parameter.low <= parameter.clipped(float(value)) <= parameter.high:
        return f"{quoted(value)} is out of range: expected {_expected(parameter)}"
    return None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _expected(parameter: HyperParameter) -> str:
    kinds: Mapping[type, str] = {bool: "true or false", int: "a whole number", str: "a word"}
    kind = kinds.get(parameter.type, "a number")
    low, high = parameter.low, parameter.high
    if low > float("-inf") and high < float("inf"):
        return f"{kind} from {low:g} to {high:g}"
    if low > float("-inf"):
        return f"{kind} >= {low:g}"
    return f"{kind} <= {high:g}" if high < float("inf") else kind


Located = tuple[FieldPath, str]


def recipe_faults(recipe: Recipe) -> list[Located]:
    """`(path, message)` of everything that makes the recipe impossible for its merge method."""
    operator = OPERATORS.get(recipe.merge_method)
    if operator is None:
        near = did_you_mean(recipe.merge_method, OPERATORS) or f" (known: {', '.join(sorted(OPERATORS))})"
        return [(("merge_method",), f"unknown merge method {quoted(recipe.merge_method)}{near}")]
    found: list[Located] = []
    for path, scope in _scopes(recipe):
        found += _value_faults(operator, path, scope)
    for slices in scoped_parts(recipe, operator).values():
        if not any(map(_takes_layers, slices)):
            found.append((slices[0].path, "no slice takes a layer: [a, b] is layers a to b - 1"))
        for piece in slices:
            found += _slice_faults(operator, piece)
    return found


def _takes_layers(piece: ScopedSlice) -> bool:
    return any(s.layer_range is None or s.layer_range[0] < s.layer_range[1] for s in piece.sources)


def recipe_warnings(recipe: Recipe) -> list[Located]:
    """`(path, message)` of what is accepted and has no effect where it stands."""
    operator = OPERATORS[recipe.merge_method]
    found: list[Located] = [*_unread_names(operator, recipe), *_clipped(operator, recipe)]
    for slices in scoped_parts(recipe, operator).values():
        for piece in slices:
            for source in piece.sources:
                found += _unread(operator, piece, source)
                found += _other_spelling(operator, piece, source)
    for path, _, part in recipe.parts():
        for i, piece in enumerate(part.slices or ()):
            if piece.residual_weight is not None:
                found.append(((*path, "slices", i, "residual_weight"), "has no effect"))
            if piece.sources[0].layer_range[0] == piece.sources[0].layer_range[1]:
                found.append(
                    (
                        (*path, "slices", i),
                        "takes no layers; first or last it still gives the tensors before or after them",
                    )
                )
    return found


def _scopes(recipe: Recipe) -> Iterator[tuple[FieldPath, Scope]]:
    yield ("parameters",), recipe.parameters
    for path, name, part in recipe.parts():
        if name is not None:
            yield (*path, "parameters"), part.parameters
        for i, model in enumerate(part.models or ()):
            yield (*path, "models", i, "parameters"), model.parameters
        for i, piece in enumerate(part.slices or ()):
            yield (*path, "slices", i, "parameters"), piece.parameters
            for j, source in enumerate(piece.sources):
                yield (*path, "slices", i, "sources", j, "parameters"), source.parameters


def _value_faults(operator: Operator, path: FieldPath, scope: Scope) -> Iterator[Located]:
    for name, setting in scope.items():
        parameter = operator.parameter(name)
        if parameter is None:
            if name not in IGNORED and name not in _known_names():
                names = [p.name for p in operator.parameters]
                near = did_you_mean(name, names) or f" (it has {', '.join(names) or 'none'})"
                yield (*path, name), f"unknown parameter of {operator.name!r}{near}"
            continue
        messages = (value_fault(parameter, value) for value in setting.scalars())
        yield from (((*path, name), message) for message in dict.fromkeys(messages) if message)


@cache
def _known_names() -> frozenset[str]:
    """The parameters of all operators."""
    return frozenset(p.name for operator in OPERATORS.values() for p in operator.parameters)


def _unread_names(operator: Operator, recipe: Recipe) -> Iterator[Located]:
    """Parameters that other operators read, each at the first of its places."""
    places: dict[str, list[FieldPath]] = {}
    for path, scope in _scopes(recipe):
        for name in scope:
            if operator.parameter(name) is None and name not in IGNORED and name in _known_names():
                places.setdefault(name, []).append((*path, name))
    has = ", ".join(p.name for p in operator.parameters) or "none"
    for where in places.values():
        count = len(where) - 1
        more = f", nor in {count} other place{'s' if count > 1 else ''}" if count else ""
        yield where[0], f"has no effect{more}: {operator.name!r} has no such parameter (it has {has})"


def _clipped(operator: Operator, recipe: Recipe) -> Iterator[Located]:
    """Values beyond a bound that are taken for the bound."""
    for path, scope in _scopes(recipe):
        for name, setting in scope.items():
            parameter = operator.parameter(name)
            if parameter is None or parameter.clips == "neither":
                continue
            for value in dict.fromkeys(setting.scalars()):
                if isinstance(value, bool | str | None) or parameter.clipped(value) == value:
                    continue
                bound, expected = parameter.clipped(value), _expected(parameter)
                yield (*path, name), f"{quoted(value)} counts as {bound:g}: {expected} was expected"


def _same_folder(one: str, other: str) -> bool:
    return one != other and os.path.normpath(one) == os.path.normpath(other)


def _other_spelling(operator: Operator, piece: ScopedSlice, source: ScopedSource) -> Iterator[Located]:
    base = piece.base
    if base is not None and source is not base and _same_folder(source.model, base.model):
        yield (
            source.path,
            f"model {quoted(source.model)} is the base model {quoted(base.model)} in another spelling, and "
            "counts as another model: write both alike",
        )


def _slice_faults(operator: Operator, piece: ScopedSlice) -> Iterator[Located]:
    names = [source.model for source in piece.inputs]
    seen: set[str] = set()
    for source in piece.inputs:
        repeated = source.model in seen
        seen.add(source.model)
        if repeated:
            yield (
                source.path,
                f"model {quoted(source.model)} is listed twice: give each once, with its whole weight",
            )
    if operator.base == "required" and piece.base is None:
        ranges = {source.layer_range for source in piece.inputs}
        yield (
            piece.path,
            (
                f"{operator.name!r} needs a base model: add 'base_model:'"
                if len(ranges) == 1
                else f"{operator.name!r} needs the base model among the sources of this slice"
            ),
        )
    few, many = operator.min_models, operator.max_models
    if len(names) < few or (many is not None and len(names) > many):
        wanted = str(few) if few == many else f"at least {few}" if many is None else f"{few} to {many}"
        besides = " besides the base model" if operator.base != "as_input" else ""
        listed = f" ({shortened(', '.join(names[:20]), 400)})" if names else ""
        base = None if piece.base is None else piece.base.model
        twin = next((name for name in names if base is not None and _same_folder(name, base)), None)
        hint = (
            "" if twin is None else f": {quoted(twin)} is the base model {quoted(base)}, so write both alike"
        )
        yield (
            piece.path,
            f"{operator.name!r} takes {wanted} model(s){besides}, found {len(names)}{listed}{hint}",
        )
    yield from _statistics_faults(operator, piece)
    for parameter in operator.parameters:
        if parameter.one_of_models:
            yield from _unknown_models(parameter, piece, names)
        if not parameter.required or any(parameter.name in scope for scope in piece.shared):
            continue
        if not parameter.per_model:
            yield ("parameters", parameter.name), f"{operator.name!r} needs this parameter: set it here"
            continue
        for source in piece.inputs:
            if parameter.name not in source.parameters:
                yield (
                    (*source.path, "parameters", parameter.name),
                    f"{operator.name!r} needs this parameter for model {quoted(source.model)}: set it here, "
                    "or for all models in the top-level 'parameters'",
                )


def _unknown_models(parameter: HyperParameter, piece: ScopedSlice, names: list[str]) -> Iterator[Located]:
    """Values that should name one of the models and do not."""
    for scope in piece.shared:
        for value in scope[parameter.name].scalars() if parameter.name in scope else ():
            if isinstance(value, str) and position_of(value, names) is None:
                yield (
                    ("parameters", parameter.name),
                    f"{quoted(value)} names none, or more than one, of the models: write one of "
                    f"{shortened(', '.join(names[:20]), 400)}",
                )


def _statistics_faults(operator: Operator, piece: ScopedSlice) -> Iterator[Located]:
    for source in piece.sources:
        given = source.statistics is not None
        if given and operator.statistics is None:
            takers = ", ".join(repr(name) for name, other in OPERATORS.items() if other.statistics)
            yield (
                (*source.path, "statistics"),
                f"{operator.name!r} takes no statistics (those that do: {takers}): remove it",
            )
        if not given and operator.statistics is not None and source is not piece.base:
            yield (
                source.path,
                f"{operator.name!r} needs statistics of model {quoted(source.model)}: add 'statistics:', a "
                f"folder that 'mergelab statistics --kind {operator.statistics}' has written",
            )


def _unread(operator: Operator, piece: ScopedSlice, source: ScopedSource) -> Iterator[Located]:
    if source.statistics is not None and source is piece.base:
        yield (
            (*source.path, "statistics"),
            f"is never read for the base model of {operator.name!r}: remove it",
        )
    for name in source.parameters:
        parameter = operator.parameter(name)
        if parameter is None:
            continue
        path = (*source.path, "parameters", name)
        if not model_scope_read(operator, parameter):
            yield path, "is shared by all models and never read here: move it to the top-level 'parameters'"
        elif source is piece.base:
            yield path, f"is never read for the base model of {operator.name!r}: remove it"
