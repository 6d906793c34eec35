"""Averages of folders: all at once, or folded in as checkpoints come."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from mergelab.checkpoints.hub import hub_origin
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path, location_text
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError, OperatorError, OutputError, RecipeError
from mergelab.merging.recipe.schema import InputModel, Recipe
from mergelab.merging.run_merge import merge
from mergelab.merging.soups.averages import Candidates, uniform_soup

__all__ = [
    "RunningFolder",
    "StrPath",
    "average_checkpoints",
    "by_step",
    "candidate_names",
    "soup",
    "soup_recipe",
    "update_average",
]


StrPath = str | os.PathLike[str]


def soup(
    candidates: Candidates,
    out: StrPath | None = None,
    *,
    last: int | None = None,
    **options: Any,
) -> PyTree[Array] | Path:
    """Averages fine-tuned siblings: in memory, or from folders to a folder.

    `greedy_soup` and `greedy_soup_checkpoints` choose what to average on validation data.

    Args:
        candidates: parameter trees of one structure, or checkpoint folders; by name, or in order.
        out: the folder to write, for folders: they are then streamed, and memory does not grow with the
            models. Without it the average is returned as a tree, of folders by tensor name.
        last: how many of the last candidates to average; all by default.
        options: further options, with `out`, of `mergelab.merge` (`dtype`, `memory`, `overwrite`, ...).

    Returns:
        The mean tree, in the dtypes of the first; or the path `out`.

    Raises:
        OperatorError: there are no trees, or they differ in structure, shape or a leaf that has no mean.
        RecipeError: candidates with `out` are not folders, one is given twice, or the architectures differ.
        CheckpointError: a checkpoint is missing or malformed.
        OutputError: `out` cannot be written.
    """
    items = list(candidates.values() if isinstance(candidates, Mapping) else candidates)
    if last is not None:
        if last < 1:
            raise OperatorError(f"last is {last}; a soup averages at least 1 candidate.")
        items = items[-last:]
    if out is None:
        if options:
            raise OperatorError(f"{next(iter(options))!r} is an option of writing a folder; name one (out=).")
        return uniform_soup(items)
    folders = [item for item in items if isinstance(item, str | os.PathLike)]
    if len(folders) < len(items):
        raise RecipeError(
            "trees in memory were given with out=; give folders, or save the soup (save_model)."
        )
    average_checkpoints(folders, out, **options)
    return Path(out)


def soup_recipe(weights: Mapping[Path, float], dtype: str | None = None) -> Recipe:
    """Returns the recipe of a weighted mean of checkpoints.

    Args:
        weights: relative weights by checkpoint; they need not add up to 1.
        dtype: the stored dtype; None keeps that of the checkpoints.

    Raises:
        RecipeError: a path that a recipe cannot name.
    """
    models = tuple(
        InputModel.model_validate({"model": _reference(path), "parameters": {"weight": weight}})
        for path, weight in weights.items()
    )
    return Recipe(merge_method="linear", models=models, out_dtype=dtype, parameters={"normalize": True})


def _reference(path: Path) -> str:
    """How a recipe names a checkpoint: what was fetched from the hub by its id and commit."""
    if (origin := hub_origin(path)) is not None:
        return str(origin)
    if odd := next((c for c in "@+" if c in str(path)), None):
        raise RecipeError(
            f"{path} has {odd!r} in its name, which recipes read as a revision or an adapter; "
            "rename the folder or pass a link to it."
        )
    return str(path)


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

    Checkpoints on the Hugging Face hub or at URLs are fetched, and called as they are given.

    Raises:
        RecipeError: there are none, or one is given twice.
    """
    if not checkpoints:
        raise RecipeError("A soup needs at least one checkpoint; none was given.")
    given = [location_text(checkpoint) for checkpoint in checkpoints]
    paths = [local_path(text) for text in given]
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise RecipeError(f"Checkpoint {paths[i]} is given twice; give each checkpoint once.")
    names = [
        place.resolve().name if Path(text) == place else text
        for place, text in zip(paths, given, strict=True)
    ]
    unique = len(set(names)) == len(names)
    return {name if unique else text: path for name, text, path in zip(names, given, paths, strict=True)}


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


STATE = "soup_state.json"


@dataclass(frozen=True)
class RunningFolder:
    """What an average on disk is made of, stored beside its weights as `soup_state.json`.

    Attributes:
        checkpoints: the checkpoints folded in so far, oldest first, by absolute path.
        decay: the decay of an exponential average; None for the equal-weight mean.
    """

    checkpoints: tuple[str, ...]
    decay: float | None = None


def update_average(
    checkpoints: Sequence[StrPath], out: StrPath, *, decay: float | None = None, **options: Any
) -> RunningFolder:
    """Folds checkpoints into the average in `out`, starting it if it is not there; they may then be deleted.

    The average is held in float32, so rounding does not compound however many checkpoints are folded in;
    it is an ordinary checkpoint and can be loaded, evaluated or cast at any time. The update is written
    beside `out` and swapped in, so an interruption leaves the old average or the new one.

    Args:
        checkpoints: new model folders, oldest first.
        out: the average.
        decay: None for the mean of all checkpoints ever folded in, `n/(n+1)` of the old and `1/(n+1)` of
            each new one; a number in [0, 1] for an exponential average, started at its first checkpoint.
        options: further options of `mergelab.merge`.

    Returns:
        What the average now consists of; where all of `checkpoints` are in it already, nothing is written.

    Raises:
        RecipeError: `decay` is out of range, or some checkpoints are in the average already and some are not.
        OutputError: `out` is something else than an average of this kind.
    """
    if decay is not None and not 0 <= decay <= 1:
        raise RecipeError(f"decay is {decay}; an exponential average needs a decay within [0, 1].")
    fresh = list(candidate_names(checkpoints).values())
    with WorkFolder(Path(out), inputs=fresh, overwrite=True) as work:
        state = _read(work.out, decay) if _holds_files(work.out) else RunningFolder((), decay)
        known = [path for path in fresh if str(path.resolve()) in state.checkpoints]
        if len(known) == len(fresh):
            return state  # so that a command that was killed at its very end can be given again
        if known:
            raise RecipeError(
                f"Checkpoint {known[0]} is in the average {out} already; fold in each one once."
            )
        work.prepare()
        after = RunningFolder((*state.checkpoints, *(str(path.resolve()) for path in fresh)), decay)
        weights = _weights(len(state.checkpoints), len(fresh), decay)
        paths = [work.out, *fresh] if state.checkpoints else fresh
        kept = {path: weight for path, weight in zip(paths, weights, strict=True) if weight > 0}
        work.clear_stages()
        made = work.stages / work.out.name  # named as its model card shall say
        average_checkpoints(kept, made, dtype="float32", **options)
        text = json.dumps(asdict(after), indent=2) + "\n"
        with disk_errors(work.out):
            (made / STATE).write_text(text, encoding="utf-8")
            work.clear(recreate=False)
            made.rename(work.path)
        work.publish(hashlib.sha256(text.encode()).hexdigest())
    return after


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _weights(before: int, new: int, decay: float | None) -> list[float]:
    """Weights of the old average (if there is one) and of each new checkpoint."""
    if decay is None:
        return [*([float(before)] if before else []), *[1.0] * new]
    # Without an old average the first new checkpoint takes its place.
    steps = new if before else new - 1
    return [decay**steps, *((1 - decay) * decay ** (steps - i) for i in range(1, steps + 1))]


def _read(out: Path, decay: float | None) -> RunningFolder:
    try:
        data = read_json_object(out / STATE)
        state = RunningFolder(tuple(data["checkpoints"]), data["decay"])
    except (CheckpointError, KeyError, TypeError) as error:
        raise OutputError(
            f"{out} exists and is not a running average (no readable {STATE}); choose another output folder."
        ) from error
    if state.decay != decay:
        kinds = ["a running mean" if d is None else f"an average of decay {d}" for d in (state.decay, decay)]
        raise OutputError(f"{out} holds {kinds[0]}, not {kinds[1]}; choose another output folder.")
    return state
