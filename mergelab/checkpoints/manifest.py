"""A list of a folder's files with sizes and digests: proof that what was written is what lies there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergelab.checkpoints.json_data import read_json
from mergelab.checkpoints.publish import sync_path, sync_tree
from mergelab.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "Entry",
    "digest_file",
    "file_fault",
    "first_fault",
    "list_files",
    "write_manifest",
    "write_whole",
]

MANIFEST = "manifest.json"
"""Name of the list within its folder; it is written last, so a folder without one is not whole."""

_FORMAT = "mergelab-manifest-1"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What a file was when it was written.

    Attributes:
        bytes: its size.
        xxh3_128: digest of its content, in hex.
    """

    bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> Entry:
        """The entry of a file as it is now."""
        return cls(path.stat().st_size, digest_file(path))

    @classmethod
    def parse(cls, said: Any) -> Entry:
        """An entry read from JSON.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(said, dict):
            raise ValueError("no entry")
        size, digest = said.get("bytes"), said.get("xxh3_128")
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError("no entry")
        return cls(size, digest)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below a folder by its relative name, with size and digest, as plain JSON data."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): asdict(Entry.of(path)) for path in paths}


def write_manifest(folder: Path) -> None:
    """Lists every file below a folder, brings all of it to the disk, and writes the list last.

    Raises:
        OSError: the file system refuses.
    """
    files = list_files(folder)
    sync_tree(folder)
    write_whole(folder / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1))


def first_fault(folder: Path) -> str | None:
    """What is wrong with a folder that should have a manifest, in words; None if it is whole."""
    if not folder.is_dir():
        return "is not a folder"
    try:
        said = read_json(folder / MANIFEST)
    except CheckpointError:
        if not os.path.lexists(folder / MANIFEST):
            return f"has no {MANIFEST}, so it was not finished"
        return f"has a damaged {MANIFEST}"
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        return f"has a damaged {MANIFEST}"
    return file_fault(folder, said.get("files"))


def file_fault(folder: Path, files: Any) -> str | None:
    """What is wrong with files that `list_files` listed once, in words; None if nothing is."""
    try:
        entries = {str(name): Entry.parse(said) for name, said in files.items()}
    except (AttributeError, ValueError):
        return "has a damaged list of its files"
    for name, wanted in entries.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            return "has a damaged list of its files"
        try:
            if not path.is_file():
                return f"lacks {name}"
            if path.stat().st_size != wanted.bytes:
                return f"has {path.stat().st_size} of {wanted.bytes} bytes of {name}"
            if digest_file(path) != wanted.xxh3_128:
                return f"has other content in {name} than was written"
        except OSError as error:
            return f"cannot be read ({name}: {error.strerror})"
    return None


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
    sync_path(path.parent)
