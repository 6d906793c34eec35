"""A list of a folder's files with sizes and digests: proof that what was written is what lies there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["MANIFEST", "digest_file", "first_fault", "sync_file", "sync_folder", "write_manifest", "write_whole"]

MANIFEST = "manifest.json"
"""Name of the list within its folder; it is written last, so a folder without one is not whole."""

_FORMAT = "mergelab-manifest-1"
_PIECE = 1 << 20


def write_manifest(folder: Path) -> None:
    """Lists every file below a folder, brings all of it to the disk, and writes the list last.

    Raises:
        OSError: the file system refuses.
    """
    files = {}
    for path in _files(folder):
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "xxh3_128": digest_file(path),
        }
        sync_file(path)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        sync_folder(path)
    write_whole(folder / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")


def first_fault(folder: Path) -> str | None:
    """What is wrong with a folder that should have a manifest, in words; None if it is whole."""
    if not folder.is_dir():
        return "is not a folder"
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = _entries(said)
    except FileNotFoundError:
        return f"has no {MANIFEST}, so it was not finished"
    except (OSError, ValueError, RecursionError):
        return f"has a damaged {MANIFEST}"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"lacks {name}"
            found = path.stat().st_size
            if found != size:
                return f"has {found} of {size} bytes of {name}"
            if digest_file(path) != digest:
                return f"has other content in {name} than was written"
        except OSError as error:
            return f"cannot be read ({name}: {error.strerror})"
    return None


def _entries(said: Any) -> dict[str, tuple[int, str]]:
    """The files of a manifest; ValueError where it is none."""
    if not isinstance(said, dict) or said.get("format") != _FORMAT or not isinstance(said.get("files"), dict):
        raise ValueError("no manifest")
    entries = {}
    for name, entry in said["files"].items():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("xxh3_128") if isinstance(entry, dict) else None
        if type(size) is not int or not isinstance(digest, str) or ".." in Path(name).parts:
            raise ValueError("no manifest")
        entries[name] = (size, digest)
    return entries


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hex."""
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that its name holds the old text or the new one, whatever happens.

    Raises:
        OSError: the file system refuses; what lay beside is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Brings a file's bytes to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """Brings a folder's names to the disk, where the system can."""
    try:
        sync_file(path)
    except PermissionError:  # Windows opens no folders
        if os.name != "nt":
            raise
