"""One of several SAEs in a folder, as libraries leave them: a folder for each hookpoint, layer or trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mergelab.errors import CheckpointError, did_you_mean, quoted
from mergelab.sae.formats.file_format import Files
from mergelab.sae.formats.hook_names import site_of

__all__ = ["one_of"]

_DEEPEST = 4
"""Folders within folders, such as `layer_20/width_16k/average_l0_71`."""

_MOST_FOLDERS = 5_000
T = TypeVar("T")


def one_of(path: Path, sae_id: str | None, recognize: Callable[[Files], T | None]) -> T | None:
    """What `recognize` makes of the named SAE in a folder, or of the only one.

    Args:
        path: folder with SAEs in folders below it.
        sae_id: folder or file in it, or the site that the name of a folder means; None for the only one.
        recognize: what an SAE's files are; None of others.

    Returns:
        None if nothing is named and there is none.

    Raises:
        CheckpointError: there is no such SAE, or several and none is named.
    """
    if sae_id is not None:
        place = _inside(path, sae_id)
        found = None if place is None else recognize(Files(place))
        if found is not None:
            return found
    saes: dict[str, T | CheckpointError] = {}
    for folder in _folders(path):
        if any(
            outer.relative_to(path).as_posix() in saes for outer in folder.parents if path in outer.parents
        ):
            continue  # checkpoints of one that is there itself
        try:
            known = recognize(Files(folder))
        except CheckpointError as error:  # one that cannot be read is there all the same
            known = error
        if known is not None:
            saes[folder.relative_to(path).as_posix()] = known
    if sae_id is None and len(saes) < 2:
        return _sound(next(iter(saes.values()), None))
    if sae_id is not None:
        site = site_of(sae_id)
        fits = [name for name in saes if site is not None and site in map(site_of, PurePosixPath(name).parts)]
        if len(fits) == 1:
            return _sound(saes[fits[0]])
        why = f"{len(fits)} SAEs are of {sae_id}" if fits else f"holds no SAE {quoted(sae_id)}"
        near = did_you_mean(sae_id, saes)
    else:
        why, near = f"holds {len(saes)} SAEs", ""
    names = sorted(saes, key=_natural)[:12]
    more = f" and {len(saes) - len(names)} more" if len(saes) > len(names) else ""
    listed = f"; it has {', '.join(names)}{more}" if names else ""
    example = f": load_sae(path, {names[0]!r}) or the path {path / names[0]}" if names else ""
    raise CheckpointError(f"{path}: {why}{near}{listed}; name one{example}")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layers.9 before layers.10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _sound(found: T | CheckpointError) -> T:
    if isinstance(found, CheckpointError):
        raise found
    return found


def _inside(path: Path, name: str) -> Path | None:
    """A folder or file below another; None if there is none, or it leads out of it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or len(name) > 1000:
        return None
    place = path.joinpath(*parts)
    return place if place.exists() else None


def _folders(path: Path) -> Iterator[Path]:
    """Folders below one, breadth first; links and hidden folders are passed over."""
    level, seen = [path], 0
    for _ in range(_DEEPEST):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    inner = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
            except OSError:
                continue
            below += [folder / name for name in inner if not name.startswith(".")]
        seen += len(below)
        if seen > _MOST_FOLDERS:
            return
        yield from below
        level = below
