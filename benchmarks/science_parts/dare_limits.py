"""DARE with a drop probability of 0.9, on small task vectors, where it costs little, and on large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.science_parts.eight_tasks import Family, accuracies
from mergelab import operators as ops

__all__ = ["dare"]

DENSITY = 0.1
DROPS: Mapping[str, Mapping[str, Any]] = {
    "dare": {"rescale_by": "density"},
    "without_rescaling": {"rescale": False},
}


def dare(found: Family, seed: int) -> dict[str, float]:
    """Mean accuracy of specialists on their own tasks, whole and dropped; how far they are from the base."""

    def own(models: list[Any]) -> float:
        each = [accuracies(m, found.heads, *found.test)[i] for i, m in enumerate(models)]
        return float(np.mean(each))

    def length(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))

    far = [length(jax.tree.map(lambda a, b: a - b, m, found.base)) for m in found.models]
    table = {"whole": own(found.models), "distance": float(np.mean(far)) / length(found.base)}
    for name, how in DROPS.items():
        merge = ops.dare_linear(weight=1.0, density=DENSITY, **how)
        table[name] = own([merge([m], found.base, seed=seed) for m in found.models])
    return table
