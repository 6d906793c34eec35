"""`passthrough`: one model's tensor as it is, or scaled; what frankenmerges are made of."""

from __future__ import annotations

from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator
from mergelab.operators.hyper import weights
from mergelab.operators.reductions.weighted import WeightedSum

__all__ = ["passthrough"]


@operator(base="as_input", max_models=1, reference="mergekit 0.1.5, method passthrough")
def passthrough(scale: float | None = None) -> Merge:
    """Copies the single model's tensors, multiplied by `scale` if given."""
    return Merge((), WeightedSum(weights(1.0 if scale is None else scale)), deltas=False)
