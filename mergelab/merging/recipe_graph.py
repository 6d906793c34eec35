"""Recipes that use each other's results: which is the result, and in which order they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergelab.errors import MAX_FAULTS, did_you_mean, quoted, shortened
from mergelab.merging.faults import raise_faults
from mergelab.merging.model_ref import parse_model_ref
from mergelab.merging.recipe import Recipe

__all__ = ["link_recipes", "stage_order", "used_stages"]


def used_stages(recipe: Recipe, names: Mapping[str, Recipe]) -> tuple[str, ...]:
    """The names among `names` that `recipe` uses as models, tokenizer or base, each once, in order."""
    paths = (parse_model_ref(text).path for text in recipe.referenced())
    return tuple(dict.fromkeys(path for path in paths if path in names))


def link_recipes(recipes: Sequence[Recipe]) -> Recipe:
    """Makes one recipe of a file's documents.

    The result is the only document no other one refers to, or the last; the others become its `merges`, in
    the order they have to run.

    Raises:
        RecipeError: documents without a name, with the same name, unused, or leading in a circle.
    """
    if len(recipes) == 1:
        return recipes[0]
    named: dict[str, Recipe] = {}
    faults: list[str] = []
    for recipe in recipes:
        if recipe.name is None and recipe is not recipes[-1]:
            faults.append(
                recipe.origin.sentence((), "this document needs a 'name' for others to refer to it by")
            )
        elif recipe.name in named:
            message = f"another document is named {quoted(recipe.name)}: rename one"
            faults.append(recipe.origin.sentence(("name",), message))
        elif recipe.name is not None:
            named[recipe.name] = recipe
    raise_faults(faults)
    referred = {name for recipe in recipes for name in used_stages(recipe, named)}
    free = [recipe for recipe in recipes if recipe.name not in referred]
    result = free[0] if len(free) == 1 else recipes[-1]
    order = stage_order(result, named)
    used, texts = set(order), [*result.model_texts()]
    for recipe in recipes:
        if recipe is not result and recipe.name not in used:
            near = did_you_mean(recipe.name or "", texts) if len(faults) <= MAX_FAULTS else ""
            message = f"no document uses {quoted(recipe.name)}{near}: refer to it or remove it"
            faults.append(recipe.origin.sentence(("name",), message))
    raise_faults(faults)
    linked = result.model_copy(update={"merges": tuple(named[name] for name in order)})
    object.__setattr__(linked, "_origin", result.origin)
    return linked


def stage_order(result: Recipe, named: Mapping[str, Recipe]) -> tuple[str, ...]:
    """The names `result` needs, each after the ones it needs itself.

    Raises:
        RecipeError: the names lead in a circle.
    """
    order: dict[str, None] = {}
    # The names that lead from the result to where the walk is, each with what it has still to look at: a
    # stack of our own, since a chain may be longer than Python recurses.
    trail: dict[str | None, Iterator[str]] = {result.name: iter(used_stages(result, named))}
    while trail:
        last = next(reversed(trail))
        name = next(trail[last], None)
        if name is None:
            del trail[last]
            if trail:
                assert last is not None
                order[last] = None
        elif name in trail:
            names = [str(found) for found in trail]
            circle = shortened(" -> ".join([*names[names.index(name) :], name]), 400)
            recipe = named.get(str(last), result)
            raise_faults([recipe.origin.sentence((), f"the merges lead in a circle: {circle}")])
        elif name not in order:
            trail[name] = iter(used_stages(named[name], named))
    return tuple(order)
