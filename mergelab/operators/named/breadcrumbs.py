"""`breadcrumbs` and `breadcrumbs_ties`: mask both tails of each task vector, add up the rest."""

from __future__ import annotations

from typing import Annotated, Any

from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator
from mergelab.operators.hyper import exact
from mergelab.operators.named.task_vectors import Density, task_vector_merge
from mergelab.operators.stages.trim import MaskTails

__all__ = ["breadcrumbs", "breadcrumbs_ties"]

Gamma = Annotated[float, PerModel(), Range(0.0, 1.0)]
_REFERENCE = "Davari and Belilovsky, 'Model Breadcrumbs', arXiv 2312.06795"


@operator(base="required", min_models=0, reference=_REFERENCE)
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


@operator(base="required", min_models=0, reference=_REFERENCE)
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
