"""Recipe files: text to one checked recipe (with the recipes it builds on, in their order), and back."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mergelab.checkpoints.text_file import read_text
from mergelab.checkpoints.yaml_data import YamlDocument, parse_yaml
from mergelab.errors import MAX_FAULTS, RecipeError, did_you_mean, quoted, shortened
from mergelab.merging.recipe.dialect import RecipeReading, read_as_mergekit
from mergelab.merging.recipe.faults import FieldPath, LocatedError, Origin, raise_faults
from mergelab.merging.recipe.model_refs import parse_model_ref
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import recipe_faults

__all__ = [
    "YamlDocument",
    "link_recipes",
    "load_recipe",
    "parse_documents",
    "parse_recipe",
    "recipe_yaml",
    "stage_order",
    "used_stages",
]


def parse_documents(text: str, source: str = "recipe") -> list[YamlDocument]:
    """Parses every document of a recipe; see `mergelab.checkpoints.yaml_data.parse_yaml`.

    Of two equal keys the later counts, and numbers are those of YAML 1.1, as mergekit reads them;
    `YamlDocument.repeated` and `YamlDocument.old_numbers` name them.

    Raises:
        RecipeError: faulty YAML; every sentence begins with `source` and a line.
    """
    return parse_yaml(text, source, RecipeError, strict_keys=False, old_numbers=True)


def used_stages(recipe: Recipe, names: Mapping[str, Recipe]) -> tuple[str, ...]:
    """The names among `names` that `recipe` uses as models, tokenizer or base, each once, in order."""
    paths = (parse_model_ref(text).path for text in recipe.referenced())
    return tuple(dict.fromkeys(path for path in paths if path in names))


def link_recipes(recipes: Sequence[Recipe]) -> Recipe:
    """Makes one recipe of a file's documents.

    The result is the only document no other one refers to, else the only one without a name, else the last;
    those it builds on become its `merges`, in the order they have to run. The rest is not made, with a note.

    Raises:
        RecipeError: documents without a name, with the same name, unused, or leading in a circle.
    """
    if len(recipes) == 1:
        return recipes[0]
    named: dict[str, Recipe] = {}
    faults: list[str] = []
    without = [recipe for recipe in recipes if recipe.name is None]
    for recipe in recipes:
        if recipe.name is None and recipe is not without[-1]:
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
    nameless = [recipe for recipe in free if recipe.name is None]
    result = free[0] if len(free) == 1 else nameless[0] if len(nameless) == 1 else recipes[-1]
    order = stage_order(result, named)
    used, texts, unused = set(order), [*result.model_texts()], list[str]()
    for recipe in recipes:
        if recipe is not result and recipe.name not in used:
            near = did_you_mean(recipe.name or "", texts) if len(unused) <= MAX_FAULTS else ""
            message = f"no document uses {quoted(recipe.name)}{near}, so it is not made: run it by itself"
            unused.append(recipe.origin.sentence(("name",), message))
    linked = result.model_copy(update={"merges": tuple(named[name] for name in order)})
    more = [f"and {len(unused) - MAX_FAULTS} more documents are not made"] if len(unused) > MAX_FAULTS else []
    notes = (*result.origin.notes, *unused[:MAX_FAULTS], *more)
    object.__setattr__(linked, "_origin", replace(result.origin, notes=notes))
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


MAX_RECIPE = 16 * 2**20
"""Bytes of the largest recipe that is read."""

# What stands in for a faulty required field, so that the rest of the recipe can be checked as well.
_NO_MODEL = "<missing model>"
_STAND_INS: Mapping[str, Any] = {"model": _NO_MODEL, "layer_range": (0, 1), "value": 0, "kind": "zero"}


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe file; of several documents, the one that the others lead to.

    Raises:
        RecipeError: everything wrong with it, one sentence per fault with its line.
    """
    path = Path(path)
    if not os.path.lexists(path):
        if re.match(r"[a-z][a-z0-9+.-]*:/", str(path)):
            raise RecipeError(f"recipe {quoted(str(path), 200)} is a URL; download it and name the file")
        raise RecipeError(f"recipe {quoted(str(path), 200)} does not exist (looked in {Path.cwd()})")
    try:
        text = read_text(path, MAX_RECIPE, error=RecipeError)
    except RecipeError as error:
        raise RecipeError(f"recipe {error}") from None
    return parse_recipe(text, path.name, path.resolve())


def parse_recipe(text: str, source: str = "recipe", path: Path | None = None) -> Recipe:
    """Reads and checks a recipe from YAML text; `source` names it in messages, `path` is its file."""
    documents = parse_documents(text, source)
    if not documents:
        raise RecipeError(f"{source}: is empty: a recipe needs at least 'merge_method' and 'models'")
    recipes: list[Recipe] = []
    faults: list[str] = []
    for document in documents:
        recipe, found = _read(document, Origin(source, path, document.lines))
        faults += found
        if recipe is not None:
            recipes.append(recipe)
    raise_faults(faults)
    return link_recipes(recipes)


def _read(document: YamlDocument, origin: Origin) -> tuple[Recipe | None, list[str]]:
    """One document and its faults; faulty fields are left out so that the rest is checked too."""
    data: Any = copy.deepcopy(document.data)
    reading = read_as_mergekit(data)
    data = reading.data
    if not isinstance(data, dict):
        return None, [origin.sentence((), f"expected a mapping with 'merge_method', found {quoted(data)}")]
    located: list[tuple[FieldPath, str]] = []
    repaired: list[FieldPath] = []
    origin = replace(origin, notes=_notes(document, reading, origin))
    while True:
        try:
            recipe = Recipe(**data)
            break
        except LocatedError as error:
            located += error.located
            paths = [path for path, _ in error.located]
        # Each round checks the recipe anew, and more faults than these are not shown.
        if len(located) > MAX_FAULTS or not all([_repair(data, path) for path in paths]):
            return None, _in_line_order([*located, *reading.misspelled], origin)
        repaired += paths
    object.__setattr__(recipe, "_origin", origin)
    for path, message in recipe_faults(recipe):
        consequence = any(path[: len(fixed)] == fixed for fixed in repaired)
        if not consequence and _NO_MODEL not in message:
            located.append((path, message))
    if located:  # a key that is nearly right is why another one is missing
        located += reading.misspelled
    return recipe, _in_line_order(located, origin)


def _notes(document: YamlDocument, reading: RecipeReading, origin: Origin) -> tuple[str, ...]:
    """What is read otherwise than it is written, by lines; beyond `MAX_FAULTS` only their number."""
    notes = list(dict.fromkeys(reading.notes))
    for path, line in document.repeated:
        last = origin.line(path)
        notes.append((path, f"is written twice: line {last} counts, and line {line} does not"))
    for path, text, value in dict.fromkeys(document.old_numbers):
        notes.append((path, f"{text} is read as {value}, as YAML 1.1 and mergekit read it: write {value}"))
    sentences = _in_line_order(notes, origin)
    rest = len(sentences) - MAX_FAULTS
    more = [f"{origin.source}: {rest} more places are read otherwise than they are written"]
    return (*sentences[:MAX_FAULTS], *(more if rest > 0 else ()))


def _in_line_order(located: list[tuple[FieldPath, str]], origin: Origin) -> list[str]:
    return [origin.sentence(*fault) for fault in sorted(located, key=lambda fault: origin.line(fault[0]))]


def _repair(data: Any, path: FieldPath) -> bool:
    """Removes or replaces the field at `path`; False if the rest could not be understood without it."""
    if not path:
        return False
    if path[-2:-1] == ("layer_range",):
        path = path[:-1]
    parents: tuple[Any, ...] = path[:-1]
    last = path[-1]
    try:
        for part in parents:
            data = data[part]
    except (LookupError, TypeError):
        return False  # the path leads through what the author left out
    if isinstance(data, list) and isinstance(last, int):
        if last >= len(data) or path[-2] not in ("models", "sources"):
            return False
        data[last] = {"model": f"{_NO_MODEL} {last}"} | ({"layer_range": [0, 1]} if "sources" in path else {})
        return True
    if isinstance(data, dict) and last in _STAND_INS:
        data[last] = f"{_NO_MODEL} {path}" if last == "model" else _STAND_INS[str(last)]
        return True
    return isinstance(data, dict) and data.pop(last, path) is not path


class _Dumper(yaml.SafeDumper):
    """Block style, with lists of plain values on one line and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence_inline(self, data: list[Any]) -> yaml.Node:
        plain = all(not isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_Dumper.add_representer(list, _Dumper.represent_sequence_inline)


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML (several documents if it has `merges`); `parse_recipe` restores an equal one."""
    documents = [
        one.model_dump(mode="json", exclude_defaults=True, exclude={"merges"})
        for one in (*recipe.merges, recipe)
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
