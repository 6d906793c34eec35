"""Averages of checkpoint folders, streamed through the merge engine in bounded memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.errors import RecipeError
from mergelab.merging.merge import merge
from mergelab.merging.recipe import InputModel, Recipe

__all__ = ["StrPath", "average_checkpoints", "by_step", "candidate_names", "soup_recipe"]

StrPath = str | os.PathLike[str]


def soup_recipe(weights: Mapping[Path, float], dtype: str | None = None) -> Recipe:
    """Returns the recipe of a weighted mean of checkpoints.

    Args:
        weights: relative weights by checkpoint; they need not add up to 1.
        dtype: the stored dtype; None keeps that of the checkpoints.

    Raises:
        RecipeError: a path that a recipe cannot name.
    """
    for path in weights:
        if odd := next((c for c in "@+" if c in str(path)), None):
            raise RecipeError(
                f"{path} has {odd!r} in its name, which recipes read as a revision or an adapter; "
                "rename the folder or pass a link to it."
            )
    models = tuple(
        InputModel.model_validate({"model": str(path), "parameters": {"weight": weight}})
        for path, weight in weights.items()
    )
    return Recipe(merge_method="linear", models=models, out_dtype=dtype, parameters={"normalize": True})


def average_checkpoints(
    checkpoints: Sequence[StrPath] | Mapping[Path, float],
    out: StrPath,
    *,
    dtype: str | None = None,
    **options: Any,
) -> None:
    """Writes the mean of any number of checkpoint folders to the new folder `out`.

    All inputs are read once, piece by piece, summed in float32 and rounded once to the output dtype, so
    memory does not grow with the models or their number.

    Args:
        checkpoints: model folders, equally weighted, or relative weights by folder.
        out: the folder to write; config and tokenizer come from the first checkpoint.
        dtype: the stored dtype; None keeps that of the checkpoints.
        options: further options of `mergelab.merge` (`memory`, `overwrite`, ...).

    Raises:
        RecipeError: a checkpoint is given twice, or the architectures differ.
        CheckpointError: a checkpoint is missing or malformed.
        OutputError: `out` cannot be written.
    """
    if not isinstance(checkpoints, Mapping):
        checkpoints = dict.fromkeys(candidate_names(checkpoints).values(), 1.0)
    merge(soup_recipe(checkpoints, dtype), Path(out), **options)


def candidate_names(checkpoints: Sequence[StrPath]) -> dict[str, Path]:
    """Returns checkpoints by name: their folders' names, or their paths as given where those are not unique.

    Raises:
        RecipeError: there are none, or one is given twice.
    """
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    if not paths:
        raise RecipeError("A soup needs at least one checkpoint; none was given.")
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise RecipeError(f"Checkpoint {paths[i]} is given twice; give each checkpoint once.")
    names = [path.name for path in real]
    unique = len(set(names)) == len(names)
    return {name if unique else str(path): path for name, path in zip(names, paths, strict=True)}


def by_step(checkpoints: Sequence[StrPath]) -> list[Path]:
    """Returns checkpoints by the number that ends their names (`checkpoint-200` before `checkpoint-1000`).

    If any name ends in no number the order given stays.
    """
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    steps = [re.search(r"(\d+)$", path.resolve().name) for path in paths]
    if any(step is None for step in steps):
        return paths
    numbered = [(int(step[1]), i) for i, step in enumerate(steps) if step is not None]
    return [paths[i] for _, i in sorted(numbered)]
