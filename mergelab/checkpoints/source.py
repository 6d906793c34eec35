"""The one thing the merge runner needs of an input: a named tensor whose elements can be read in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["Checkpoint", "TensorSource"]


@runtime_checkable
class TensorSource(Protocol):
    """A tensor somewhere (a file slice, a LoRA-merged weight, a re-ordered embedding), read in flat pieces.

    `read_into` may be called from several threads at once.
    """

    @property
    def name(self) -> str:
        """The tensor's name as its checkpoint spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """A numpy dtype; bfloat16 and the float8 types are those of `ml_dtypes`."""
        ...

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, of `self.dtype`) with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: the file is shorter than its header says, or cannot be read.
        """
        ...


@runtime_checkable
class Checkpoint(Protocol):
    """A model on disk: its tensors as sources, and its folder for config and tokenizer files."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` as plain data (empty if there is none)."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSource]:
        """Tensor sources by name, in file order."""
        ...
