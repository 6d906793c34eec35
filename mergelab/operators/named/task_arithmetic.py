"""`task_arithmetic`: add, subtract and scale task vectors."""

from __future__ import annotations

from typing import Annotated, Any

from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator
from mergelab.operators.named.task_vectors import Density, task_vector_merge

__all__ = ["task_arithmetic"]


@operator(
    base="required",
    min_models=0,
    reference="Ilharco et al., 'Editing models with task arithmetic', arXiv 2212.04089",
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
