"""The identity of a model's weights: what is recorded with anything that belongs to one model alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mergelab.errors import CheckpointError

__all__ = ["weights_sha256"]


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
