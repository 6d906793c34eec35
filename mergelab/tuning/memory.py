"""The memory that a fine-tuning takes on a device, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["TuningMemory"]


@dataclass(frozen=True)
class TuningMemory:
    """Bytes on one device.

    Attributes:
        trained: what is trained, float32.
        moments: the optimizer's state.
        fixed: parameters that are not trained.
        working: activations and gradients, as the compiler lays them out; None where it does not say.
    """

    trained: int
    moments: int
    fixed: int
    working: int | None

    @classmethod
    def of(cls, step: Any, state: Any, fixed: Any) -> TuningMemory:
        """What a compiled step takes with a state and what it reads beside it."""
        analysis = step.memory_analysis()
        working = getattr(analysis, "temp_size_in_bytes", None)
        return cls(_held(state.trained), _held(state.moments), _held(fixed), working)

    @property
    def total(self) -> int:
        """All of it."""
        return self.trained + self.moments + self.fixed + (self.working or 0)

    def sentence(self) -> str:
        """The figures in words."""
        parts = {"trained": self.trained, "optimizer": self.moments, "fixed": self.fixed}
        said = [f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size]
        said.append("working unknown" if self.working is None else f"working {self.working / 1e9:.2f}")
        return f"memory on a device: {self.total / 1e9:.2f} GB ({', '.join(said)})"


def _held(tree: Any) -> int:
    """Bytes of a tree on its busiest device."""
    found = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for axis in shape:
            size *= axis
        found += size
    return found
