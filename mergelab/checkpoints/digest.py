"""The identity of a model's weights: what is recorded with anything that belongs to one model alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import xxhash

from mergelab.errors import CheckpointError

__all__ = ["bounded_digest", "stat_sha256", "weights_sha256"]


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 over the weight files of a folder, their names and contents, in the order of names.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise CheckpointError(f"{folder}: holds no weight files; expected *.safetensors")
    total = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise CheckpointError(f"{folder}: weights cannot be read ({error.strerror})") from error
    return total.hexdigest()


_BLOCK = 1 << 18


def bounded_digest(path: Path, most: int) -> str:
    """XXH3-128 of a file, in hex: of all of it, or of its size and blocks spread over it where it is larger.

    Args:
        path: the file.
        most: bytes that are read, at least those of a few blocks.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    total = xxhash.xxh3_128(size.to_bytes(8, "little"))
    blocks = max(most // _BLOCK, 4)
    with path.open("rb") as file:
        if size <= blocks * _BLOCK:
            while piece := file.read(_BLOCK):
                total.update(piece)
        else:
            for block in range(blocks):  # the first begins the file, and the last ends it
                file.seek(block * (size - _BLOCK) // (blocks - 1))
                total.update(file.read(_BLOCK))
    return total.hexdigest()


def stat_sha256(*paths: str | Path) -> str:
    """SHA-256 over names, sizes and times of files, and of all files in folders; reads no contents.

    For a note that lives as long as one interrupted command, where reading everything again would be waste.

    Raises:
        CheckpointError: a path cannot be read.
    """
    total = hashlib.sha256()
    for path in map(Path, paths):
        try:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                facts = file.stat()
                times = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
                total.update(os.fsencode(file) + f" {times}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    return total.hexdigest()
