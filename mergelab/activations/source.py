"""Where activations come from: rows that can be read by number, from files, a store, or a generator."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

__all__ = ["ActivationSource"]


@runtime_checkable
class ActivationSource(Protocol):
    """Activations `[rows, d_in]`, of which any range can be read.

    `mergelab.sae.toy.ToyTruth` is one; files and stores are others.
    """

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32."""
        ...
