"""Opens what the `data` section of a configuration names."""

from __future__ import annotations

from dataclasses import fields

from mergelab.data.activations import ActivationSource, open_activation_files
from mergelab.data.toy import ToyTruth
from mergelab.errors import SAEError, did_you_mean
from mergelab.sae.config import DataSection

__all__ = ["open_data"]


def open_data(section: DataSection, tokens: int) -> tuple[ActivationSource, ActivationSource | None]:
    """The activations, and the targets where they are others.

    Args:
        section: of the configuration.
        tokens: how many rows a generated source should have, if the section does not say.

    Raises:
        CheckpointError: files are missing or malformed.
        SAEError: the section lacks what its kind needs.
    """
    if section.kind == "toy":
        known = [option.name for option in fields(ToyTruth)]
        for name in section.toy:
            if name not in known:
                raise SAEError(f"data.toy.{name} is not a known key{did_you_mean(name, known)}.")
        return ToyTruth(**{"rows": tokens, **section.toy}), None
    if section.path is None:
        raise SAEError("data.path is missing: data of kind 'files' needs the files' path or glob.")
    target = None if section.target_path is None else open_activation_files(section.target_path)
    return open_activation_files(section.path), target
