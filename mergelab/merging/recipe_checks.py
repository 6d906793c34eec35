"""What a well-formed recipe can still get wrong for its merge method: faults and warnings, all at once."""

from __future__ import annotations

from collections.abc import Iterator

from mergelab.errors import did_you_mean, quoted, shortened
from mergelab.merging.faults import FieldPath
from mergelab.merging.parameters import IGNORED, model_scope_read, value_fault
from mergelab.merging.recipe import Recipe
from mergelab.merging.scopes import Scope, ScopedSlice, Source, scoped_parts
from mergelab.operators import OPERATORS
from mergelab.operators.declare import Operator

__all__ = ["recipe_faults", "recipe_warnings"]

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
        for piece in slices:
            found += _slice_faults(operator, piece)
    return found


def recipe_warnings(recipe: Recipe) -> list[Located]:
    """`(path, message)` of what is accepted and has no effect where it stands."""
    operator = OPERATORS[recipe.merge_method]
    found: list[Located] = []
    for slices in scoped_parts(recipe, operator).values():
        for piece in slices:
            for source in piece.sources:
                found += _unread(operator, piece, source)
    for path, _, part in recipe.parts():
        for i, piece in enumerate(part.slices or ()):
            if piece.residual_weight is not None:
                found.append(((*path, "slices", i, "residual_weight"), "has no effect"))
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
            if name not in IGNORED:
                names = [p.name for p in operator.parameters]
                near = did_you_mean(name, names) or f" (it has {', '.join(names) or 'none'})"
                yield (*path, name), f"unknown parameter of {operator.name!r}{near}"
            continue
        messages = (value_fault(parameter, value) for value in setting.scalars())
        yield from (((*path, name), message) for message in dict.fromkeys(messages) if message)


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
        yield piece.path, f"{operator.name!r} takes {wanted} model(s){besides}, found {len(names)}{listed}"
    for parameter in operator.parameters:
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


def _unread(operator: Operator, piece: ScopedSlice, source: Source) -> Iterator[Located]:
    for name in source.parameters:
        parameter = operator.parameter(name)
        if parameter is None:
            continue
        path = (*source.path, "parameters", name)
        if not model_scope_read(operator, parameter):
            yield path, "is shared by all models and never read here: move it to the top-level 'parameters'"
        elif source is piece.base:
            yield path, f"is never read for the base model of {operator.name!r}: remove it"
