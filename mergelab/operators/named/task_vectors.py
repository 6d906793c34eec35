"""The shape that all task-vector operators share: sparsify, perhaps elect signs, add up."""

from __future__ import annotations

from typing import Annotated, Any

from mergelab.operators.algebra import Stage
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range
from mergelab.operators.hyper import weights
from mergelab.operators.reductions.weighted import DisjointMean, Mean, WeightedSum
from mergelab.operators.stages.elect import Ballot, ElectSign, Tie
from mergelab.operators.stages.rescale import RescaleL1

__all__ = ["Density", "task_vector_merge"]

Density = Annotated[float, PerModel(), Range(0.0, float("inf"))]


def task_vector_merge(
    weight: Any,
    sparsify: Stage | None = None,
    *,
    normalize: bool,
    scale: Any,
    elect: bool = False,
    rescale: bool = False,
    ballot: Ballot = "sum",
    tie: Tie = "positive",
) -> Merge:
    """`B + scale reduce(elect(sparsify(X - B)))`.

    Args:
        weight: one weight, or one per model; applied before the election.
        sparsify: the stage that thins out each task vector.
        normalize: divide by the weights that took part instead of summing.
        scale: lambda.
        elect: whether entries that disagree with the elected sign are dropped.
        rescale: whether sparsifying keeps each tensor's L1 norm (mergekit's `rescale`).
        ballot: what votes, magnitudes or signs.
        tie: who wins a vote that sums to zero.
    """
    w = weights(weight)
    stages: list[Stage] = []
    if sparsify is not None:
        stages.append(RescaleL1(sparsify) if rescale else sparsify)
    if elect:
        stages.append(ElectSign(w, ballot, tie))
    reduce = (DisjointMean(w) if elect else Mean(w)) if normalize else WeightedSum(w)
    return Merge(tuple(stages), reduce, weights(scale))
