"""The dictionary that a path on the command line means: a run's `final`, or files of any known format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergelab.sae.dictionary import Dictionary

__all__ = ["open_dictionary"]


def open_dictionary(path: Path) -> Dictionary:
    """Loads it.

    Raises:
        CheckpointError: there is none, or the run has not finished.
    """
    from mergelab.errors import CheckpointError
    from mergelab.sae.formats import load_dictionary

    if (path / "final").is_dir():
        return load_dictionary(path / "final")
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: the run has not finished; go on with mergelab sae train --resume")
    return load_dictionary(path)
