"""Names and leaves of pytrees: a checkpoint is a flat mapping from dotted names to arrays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from mergelab.errors import OperatorError

__all__ = ["depths", "named_leaves", "same_structure"]


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def named_leaves(tree: Any) -> tuple[tuple[str, ...], list[Any], Any]:
    """Returns the dotted names, the leaves and the structure of a pytree, in jax's leaf order.

    A flat mapping `{"model.norm.weight": array}` keeps its names; nested trees join theirs with dots.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = tuple(".".join(_part(entry) for entry in path) for path, _ in paths)
    return names, [leaf for _, leaf in paths], structure


def same_structure(trees: Sequence[Any]) -> tuple[tuple[str, ...], list[list[Any]], Any]:
    """Flattens trees that must agree in names and shapes: names, leaves by tree, structure.

    Raises:
        OperatorError: the trees differ in their names, or a leaf in its shape.
    """
    if not trees:
        raise OperatorError("a merge needs at least one model, but got none.")
    names, first, structure = named_leaves(trees[0])
    leaves = [first]
    for position, tree in enumerate(trees[1:], start=1):
        other_names, other, _ = named_leaves(tree)
        if other_names != names:
            odd = sorted(set(names) ^ set(other_names))
            raise OperatorError(
                f"model {position} does not have the same tensors as model 0 ({len(odd)} differ, e.g. "
                f"{odd[0] if odd else 'their order'!r}); merge trees of one architecture."
            )
        for name, a, b in zip(names, first, other, strict=True):
            if jax.numpy.shape(a) != jax.numpy.shape(b):
                raise OperatorError(
                    f"tensor {name!r} has shape {jax.numpy.shape(a)} in model 0 but {jax.numpy.shape(b)} in "
                    f"model {position}; only tensors of one shape can be merged."
                )
        leaves.append(other)
    return names, leaves, structure


_BLOCK = re.compile(r"((?:[^.]*\.)*?)(\d+)\.")


def depths(names: Sequence[str]) -> list[float]:
    """How deep each named leaf's block is among those of its stack, from 0 to 1; 0 in no block.

    The first number of a dotted name that is not its end counts: `model.layers.3.mlp.weight` is in block 3 of
    the stack `model.layers`.
    """
    places = [_BLOCK.match(name) for name in names]
    last: dict[str, int] = {}
    for place in places:
        if place is not None:
            last[place[1]] = max(last.get(place[1], 0), int(place[2]))
    return [0.0 if p is None or not last[p[1]] else int(p[2]) / last[p[1]] for p in places]
