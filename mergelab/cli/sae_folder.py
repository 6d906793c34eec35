"""The dictionary that a path on the command line means: a run's `final`, or files of any known format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergelab.sae.sae import Dictionary

__all__ = ["open_dictionary"]


def open_dictionary(path: Path) -> Dictionary:
    """Loads it.

    Raises:
        CheckpointError: there is none, or the run has not finished.
    """
    from mergelab.errors import CheckpointError
    from mergelab.sae.formats import load_dictionary

    if (path / "final").is_dir():
        return _as_trained(load_dictionary(path / "final"), path / "config.yaml")
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: the run has not finished; go on with mergelab sae train --resume")
    return load_dictionary(path)


def _as_trained(dictionary: Dictionary, config: Path) -> Dictionary:
    """The dictionary of a run; where it does not say what it writes, the run's configuration does."""
    from dataclasses import replace

    from mergelab.errors import SAEError
    from mergelab.sae.sae import at_sites
    from mergelab.sae.training.config import load_config

    if dictionary.target_known or not config.is_file():
        return dictionary
    try:
        data = load_config(config).data
    except SAEError:
        return dictionary
    if data.target_site is not None:
        return at_sites(dictionary, data.site, data.target_site)
    settings = replace(dictionary.config, transcoder=data.target_path is not None)
    return replace(dictionary, config=settings)
