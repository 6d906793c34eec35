"""`ties`: trim, elect sign, disjoint mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator
from mergelab.operators.hyper import exact
from mergelab.operators.named.task_vectors import Density, task_vector_merge
from mergelab.operators.stages.elect import Ballot, Tie
from mergelab.operators.stages.trim import Trim

__all__ = ["ties"]


@operator(base="required", min_models=0, reference="Yadav et al., 'TIES-Merging', arXiv 2306.01708")
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
