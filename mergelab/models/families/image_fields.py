"""Sizes of images and patches in `config.json`: one number, or height and width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, quoted

__all__ = ["image_sizes"]

_LARGEST = 2**13


def image_sizes(
    config: Mapping[str, Any], place: str, *, image: int, patch: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image (`image_size`), and of a patch (`patch_size`).

    Args:
        config: the parsed `config.json`, or the part of it that describes a tower.
        place: its path, for messages.
        image: height and width of an image, if not given.
        patch: height and width of a patch, if not given.

    Raises:
        CheckpointError: they are neither whole numbers nor pairs of them, or a patch is larger than an image.
    """
    sizes = [
        _pair(config, name, default, place)
        for name, default in (("image_size", image), ("patch_size", patch))
    ]
    if any(whole < part for whole, part in zip(*sizes, strict=True)):
        raise CheckpointError(
            f"{place} has patches of {sizes[1]} pixels for images of {sizes[0]}; correct one of the two."
        )
    return sizes[0], sizes[1]


def _pair(config: Mapping[str, Any], name: str, default: int, place: str) -> tuple[int, int]:
    value = config.get(name, default)
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(type(size) is int and 1 <= size <= _LARGEST for size in pair):
        raise CheckpointError(
            f"{place} has {name} = {quoted(value)}, but expected a whole number from 1 to {_LARGEST:,}, or "
            "two of them; correct it."
        )
    return pair[0], pair[1]
