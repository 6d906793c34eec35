"""A recipe's three forms (models, slices, modules) as one: slices of sources with their parameter scopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergelab.merging.faults import FieldPath
from mergelab.merging.recipe import ModuleRecipe, Recipe
from mergelab.merging.setting import Setting
from mergelab.operators.declare import Operator

__all__ = ["Scope", "ScopedSlice", "Source", "scoped_parts"]

Scope = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input of a slice.

    Attributes:
        model: its reference, as the recipe writes it.
        layer_range: `(a, b)` for layers a to b - 1, or None for all of them.
        parameters: its own scope, read for per-model parameters only.
        path: its place in the recipe.
    """

    model: str
    layer_range: tuple[int, int] | None
    parameters: Scope
    path: FieldPath


@dataclass(frozen=True)
class ScopedSlice:
    """Consecutive output layers (or, in `models` form, the whole module) and how they are made.

    Attributes:
        inputs: the models merged, in recipe order; without the base, unless it counts as an input.
        base: the base model's source, or None.
        shared: the scopes below the models' own, first hit wins: slice, module, whole recipe.
        path: its place in the recipe.
    """

    inputs: tuple[Source, ...]
    base: Source | None
    shared: tuple[Scope, ...]
    path: FieldPath

    @property
    def sources(self) -> tuple[Source, ...]:
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
            Source(model.model, None, model.parameters, (*path, "models", i))
            for i, model in enumerate(part.models)
        ]
        base = recipe.base_model
        if base is not None and all(source.model != base for source in sources):
            sources.append(Source(base, None, {}, ("base_model",)))
        return (_scoped(sources, base, outer, (*path, "models"), operator),)
    found = []
    for i, piece in enumerate(part.slices or ()):
        here = (*path, "slices", i)
        sources = [
            Source(source.model, source.layer_range, source.parameters, (*here, "sources", j))
            for j, source in enumerate(piece.sources)
        ]
        base = piece.base_model or recipe.base_model
        ranges = {source.layer_range for source in sources}
        absent = base is not None and all(source.model != base for source in sources)
        if base is not None and absent and operator.base != "as_input" and len(ranges) == 1:
            sources.append(Source(base, sources[0].layer_range, {}, here))
        found.append(_scoped(sources, base, (piece.parameters, *outer), here, operator))
    return tuple(found)


def _scoped(
    sources: list[Source], base: str | None, shared: tuple[Scope, ...], path: FieldPath, operator: Operator
) -> ScopedSlice:
    if operator.base == "as_input":
        return ScopedSlice(tuple(sources), None, shared, path)
    inputs = tuple(source for source in sources if source.model != base)
    return ScopedSlice(inputs, next((s for s in sources if s.model == base), None), shared, path)
