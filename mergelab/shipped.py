"""Configurations that come with the package: `configs/` of a checkout, carried by the wheel."""

from __future__ import annotations

from pathlib import Path

from mergelab.errors import MergelabError

__all__ = ["shipped_file", "shipped_folder", "shipped_names"]


def shipped_folder(kind: str) -> Path:
    """The folder `configs/KIND`: inside the installed package, or beside it in a source checkout.

    Args:
        kind: `quickstart`, `recipes`, `sae` or `schemas`.

    Raises:
        MergelabError: the installation carries neither.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "configs" / kind, package.parent / "configs" / kind)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MergelabError(
        f"mergelab's configs/{kind} was found neither at {candidates[0]} nor at {candidates[1]}; "
        "reinstall mergelab."
    )


def shipped_names(kind: str) -> list[str]:
    """Names of the files of `configs/KIND`, sorted; none where the installation carries no such folder."""
    try:
        return sorted(file.name for file in shipped_folder(kind).glob("*.yaml"))
    except MergelabError:
        return []


def shipped_file(path: str | Path, kind: str) -> Path:
    """The file to read for a path as it was given: its own, else the one of that name in `configs/KIND`.

    `toy.yaml` and `configs/sae/toy.yaml` both name a file that comes with mergelab, wherever the current
    folder is; a file that is there always wins.

    Args:
        path: path as the user wrote it.
        kind: `quickstart`, `recipes` or `sae`.
    """
    path = Path(path)
    if path.parts not in ((path.name,), ("configs", kind, path.name)) or path.name not in shipped_names(kind):
        return path
    return path if path.exists() else shipped_folder(kind) / path.name
