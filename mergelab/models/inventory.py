"""What a model folder holds, read from its headers and its config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import FolderCheckpoint, open_checkpoint
from mergelab.errors import CheckpointError, first_faults
from mergelab.models.declaration import Leaf, stored_shapes
from mergelab.models.families import model_from_config
from mergelab.models.model import Model

__all__ = ["Inventory", "take_inventory"]


@dataclass(frozen=True)
class Inventory:
    """A model folder, without its weights.

    Attributes:
        checkpoint: the opened folder.
        model: the model its config describes, or None if it cannot be run here.
        faults: why it cannot be run, or where weights and config disagree; one sentence each.
    """

    checkpoint: FolderCheckpoint
    model: Model | None
    faults: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of stored elements, over all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.checkpoint.tensors.values())

    @property
    def dtypes(self) -> Mapping[np.dtype[Any], int]:
        """Bytes stored in each dtype, most first."""
        found: Counter[np.dtype[Any]] = Counter()
        for tensor in self.checkpoint.tensors.values():
            found[tensor.dtype] += math.prod(tensor.shape) * tensor.dtype.itemsize
        return dict(found.most_common())

    def dtype_of(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype that a leaf is stored in; that of most bytes for a leaf no tensor stores."""
        tensor = self.checkpoint.tensors.get(leaf.hf_names[0])
        return next(iter(self.dtypes)) if tensor is None else tensor.dtype


def take_inventory(path: Path | str) -> Inventory:
    """Opens a model folder or weight file, reading headers and config only.

    A model whose family is unknown still has an inventory: of its tensors.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.config:
        return Inventory(checkpoint, None, (f"{checkpoint.path} has no config.json: its family is unknown.",))
    try:
        model = model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
        model = model.for_tensors(checkpoint.tensors)
    except CheckpointError as error:
        return Inventory(checkpoint, None, (str(error),))
    return Inventory(checkpoint, model, first_faults(_disagreements(model, checkpoint)))


def _disagreements(model: Model, checkpoint: FolderCheckpoint) -> list[str]:
    """One sentence for each tensor that config and headers see differently."""
    expected, found = stored_shapes(model.table()), checkpoint.tensors
    faults = [f"the tensor {name!r} is missing." for name in expected if name not in found]
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[name])}"
            faults.append(f"the tensor {name!r} is {shapes}.")
        elif name not in expected and not model.is_unused(name):
            faults.append(f"config.json leaves no use for the tensor {name!r}.")
    return faults
