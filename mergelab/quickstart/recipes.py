"""Finds the quickstart's recipes in `configs/quickstart` and copies them next to the models they name."""

from __future__ import annotations

from pathlib import Path

import mergelab
from mergelab.checkpoints.publish import publish_file
from mergelab.errors import MergelabError

__all__ = ["copy_recipe", "recipe_folder"]

_DEFAULT_OUT = "mergelab-quickstart/"  # what the shipped recipes call the quickstart's output folder


def recipe_folder() -> Path:
    """The shipped `configs/quickstart`: inside the installed package, or beside it in a source checkout.

    Raises:
        MergelabError: the installation carries neither.
    """
    package = Path(mergelab.__file__).resolve().parent
    candidates = (package / "configs" / "quickstart", package.parent / "configs" / "quickstart")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MergelabError(
        f"mergelab's configs/quickstart was found neither at {candidates[0]} nor at {candidates[1]}; "
        "reinstall mergelab."
    )


def copy_recipe(name: str, folder: Path) -> Path:
    """Writes the recipe `name` into `folder`, which lies in the output folder, with paths relative to it."""
    text = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    path = folder / f"{name}.yaml"
    folder.mkdir(exist_ok=True)
    publish_file(path, text.replace(_DEFAULT_OUT, "../").encode())
    return path
