"""Every supported model family by its `model_type`, and how a `config.json` becomes a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, did_you_mean
from mergelab.models.families.llama import LLAMA
from mergelab.models.family import Family
from mergelab.models.model import Model

__all__ = ["FAMILIES", "model_from_config"]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
}


def model_from_config(config: Mapping[str, Any], place: str = "config.json") -> Model:
    """The model that a parsed `config.json` describes.

    Args:
        config: the parsed file.
        place: its path, for messages.

    Raises:
        CheckpointError: the model type is missing or unknown, or a field is missing, unknown, or has a value
            that the family does not implement.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(
            f"{place} has model_type {kind!r}{did_you_mean(str(kind), FAMILIES)}, but the supported ones are "
            f"{', '.join(FAMILIES)}; docs/models.md shows how to add a family."
        )
    return Model(family, family.read(config, place), dict(config))
