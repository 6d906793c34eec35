"""The guard that ends a training which gets worse, measured by where it began."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["HARMLESS", "WORSE", "DivergenceGuard"]

HARMLESS = 10.0
"""A normalized error (NMSE) up to which no training is ended: a batch of outliers passes."""

WORSE = 3.0
"""Multiple of the lowest error so far, the first step's included, above which a training has diverged."""


class DivergenceGuard:
    """Tells a training that diverges from one that begins badly.

    A dense variant with many latents on narrow activations begins with errors far above 1, and falls. An
    error is therefore compared with the lowest one so far, of which the first is that of the parameters
    before any step: the limit is `max(HARMLESS, WORSE * lowest)`.
    """

    def __init__(self, first: float = math.inf) -> None:
        """Begins with the error of the parameters before any step, or of a checkpoint."""
        self._lowest = first if math.isfinite(first) else math.inf

    @property
    def limit(self) -> float:
        """The NMSE above which the training has diverged."""
        return HARMLESS if self._lowest == math.inf else max(HARMLESS, WORSE * self._lowest)

    def diverged(self, figures: Mapping[str, float]) -> bool:
        """Whether a step's figures, `nmse` among them, are those of a training that has diverged."""
        if not all(map(math.isfinite, figures.values())) or figures["nmse"] > self.limit:
            return True
        self._lowest = min(self._lowest, figures["nmse"])
        return False
