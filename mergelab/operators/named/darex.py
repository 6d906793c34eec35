"""`darex`: DARE with a rescaling factor of its own, for large task vectors and few kept entries."""

from __future__ import annotations

from typing import Annotated, Any

from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, exact, operator, weights
from mergelab.operators.named.task_vectors import task_vector_merge
from mergelab.operators.stages import Drop

__all__ = ["darex"]


@operator(
    base="required",
    min_models=0,
    reference="Deng et al., 'DARE the extreme' (DAREx-q), arXiv 2410.09344",
    helps="DARE at high drop rates, where dividing by `density` overshoots; choose `q` on data.",
)
def darex(
    weight: Annotated[Any, PerModel()],
    q: Annotated[float, PerModel(), Range(1e-3, 1.0)],
    density: Annotated[float, PerModel(), Range(0.0, 1.0)] = 0.1,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """DAREx-q: keeps each entry with probability `density` and divides what is kept by `q`.

    `q = density` is DARE, whose large factor lets rare entries dominate; the paper chooses a larger q, for
    the whole model, by a validation score. Helps where nearly all is dropped, or task vectors are large.
    """
    drop = Drop(exact(density), q=weights(q))
    return task_vector_merge(weight, drop, normalize=normalize, scale=lambda_)
