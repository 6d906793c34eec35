"""`dare_linear` and `dare_ties`: drop task-vector entries at random, rescale the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator
from mergelab.operators.hyper import exact
from mergelab.operators.named.task_vectors import Density, task_vector_merge
from mergelab.operators.stages.drop import Drop

__all__ = ["dare_linear", "dare_ties"]

RescaleBy = Literal["l1", "density"]
_REFERENCE = "Yu et al., 'Language Models are Super Mario' (DARE), arXiv 2311.03099"


def _dare(
    weight: Any,
    density: Any,
    normalize: bool,
    rescale: bool,
    lambda_: Any,
    rescale_by: RescaleBy,
    elect: bool,
) -> Merge:
    drop = Drop(exact(density), rescale=rescale and rescale_by == "density")
    return task_vector_merge(
        weight, drop, normalize=normalize, scale=lambda_, elect=elect, rescale=rescale and rescale_by == "l1"
    )


@operator(base="required", min_models=0, reference=_REFERENCE)
def dare_linear(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    rescale_by: RescaleBy = "l1",
) -> Merge:
    """DARE: keep each entry of each task vector with probability `density`, rescale, add up.

    `rescale_by="l1"` matches each tensor's L1 norm (mergekit); `density` divides by `density`, which is the
    paper's unbiased `1 / (1 - p)`. `int8_mask` is accepted for compatibility and changes nothing.
    """
    return _dare(weight, density, normalize, rescale, lambda_, rescale_by, elect=False)


@operator(base="required", min_models=0, reference=_REFERENCE)
def dare_ties(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    rescale_by: RescaleBy = "l1",
) -> Merge:
    """DARE, then TIES's sign election: entries that disagree with the elected sign are dropped."""
    return _dare(weight, density, normalize, rescale, lambda_, rescale_by, elect=True)
