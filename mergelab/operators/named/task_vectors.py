"""Task-vector merges: task arithmetic, TIES and Breadcrumbs, each one call of `task_vector_merge`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergelab.operators.algebra import Stage
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, exact, operator, weights
from mergelab.operators.reductions import DisjointMean, Mean, WeightedSum
from mergelab.operators.stages import Ballot, ElectSign, MaskTails, RescaleL1, Tie, Trim

__all__ = ["Density", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic", "task_vector_merge", "ties"]


Density = Annotated[float, PerModel(), Range(0.0, float("inf"), clips="low")]


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


@operator(
    base="required",
    min_models=0,
    reference="Ilharco et al., 'Editing models with task arithmetic', arXiv 2212.04089",
    helps="Skills to add or (negative weights) to remove; on language models what helps most reliably.",
)
def task_arithmetic(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Merge:
    """`B + lambda sum_i w_i (X_i - B)`; a negative weight forgets a task.

    `density`, `rescale` and `int8_mask` are accepted for compatibility: task arithmetic trims nothing.
    """
    return task_vector_merge(weight, normalize=normalize, scale=lambda_)


@operator(
    base="required",
    min_models=0,
    reference="Yadav et al., 'TIES-Merging', arXiv 2306.01708",
    shares="elected",
    helps="Several tasks with large, noisy task vectors whose signs conflict.",
)
def ties(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    scope: Literal["tensor", "tree"] = "tensor",
    elect: Ballot = "sum",
    tie: Tie = "positive",
) -> Merge:
    """TIES-Merging: keep each task vector's largest entries, elect a sign, average those that agree.

    The defaults are mergekit's dialect. The authors' code is `scope="tree"` (thresholds over the whole
    flattened task vector) with `tie="majority"`; `elect="count"` lets signs vote instead of magnitudes.
    `int8_mask` is accepted for compatibility and changes nothing.
    """
    return task_vector_merge(
        weight,
        Trim(exact(density), scope),
        normalize=normalize,
        scale=lambda_,
        elect=True,
        rescale=rescale,
        ballot=elect,
        tie=tie,
    )


Gamma = Annotated[float, PerModel(), Range(0.0, 1.0, clips="high")]
_REFERENCE = "Davari and Belilovsky, 'Model Breadcrumbs', arXiv 2312.06795"


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    helps="Task vectors with outliers: the largest changes are left out along with the smallest.",
)
def breadcrumbs(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    gamma: Gamma = 0.01,
) -> Merge:
    """Drops each task vector's `gamma` largest entries and keeps the next `density`, then adds up.

    `int8_mask` is accepted for compatibility and changes nothing.
    """
    stage = MaskTails(exact(density), exact(gamma))
    return task_vector_merge(weight, stage, normalize=normalize, scale=lambda_, rescale=rescale)


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    shares="elected",
    helps="Breadcrumbs where signs conflict, too.",
)
def breadcrumbs_ties(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    gamma: Gamma = 0.01,
) -> Merge:
    """Breadcrumbs, then TIES's sign election."""
    stage = MaskTails(exact(density), exact(gamma))
    return task_vector_merge(weight, stage, normalize=normalize, scale=lambda_, elect=True, rescale=rescale)
