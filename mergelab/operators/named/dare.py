"""Merges of randomly dropped task vectors: DARE and DELLA."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, exact, is_concrete, operator
from mergelab.operators.named.task_vectors import Density, task_vector_merge
from mergelab.operators.stages import Drop, MagPrune

__all__ = ["dare_linear", "dare_ties", "della", "della_linear"]


RescaleBy = Literal["l1", "density"]
Probability = Annotated[float, PerModel(), Range(0.0, float("inf"))]
Draws = Annotated[int, Range(1, 64)]
_REFERENCE = "Yu et al., 'Language Models are Super Mario' (DARE), arXiv 2311.03099"


def _dare(
    weight: Any,
    density: Any,
    normalize: bool,
    rescale: bool,
    lambda_: Any,
    rescale_by: RescaleBy,
    draws: int,
    elect: bool,
) -> Merge:
    drop = Drop(exact(density), rescale=rescale and rescale_by == "density", draws=int(draws))
    return task_vector_merge(
        weight, drop, normalize=normalize, scale=lambda_, elect=elect, rescale=rescale and rescale_by == "l1"
    )


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    helps="Small task vectors (usual fine-tunes): most entries can go, which leaves room for others.",
)
def dare_linear(
    weight: Annotated[Any, PerModel()],
    density: Probability = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    rescale_by: RescaleBy = "l1",
    draws: Draws = 1,
) -> Merge:
    """DARE: keep each entry of each task vector with probability `density`, rescale, add up.

    `rescale_by="l1"` matches each tensor's L1 norm (mergekit); `density` divides by `density`, which is the
    paper's unbiased `1 / (1 - p)`. `draws` masks are averaged: the more, the nearer to task arithmetic.
    `int8_mask` is accepted for compatibility and changes nothing.
    """
    return _dare(weight, density, normalize, rescale, lambda_, rescale_by, draws, elect=False)


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    shares="elected",
    helps="DARE for several tasks whose signs conflict.",
)
def dare_ties(
    weight: Annotated[Any, PerModel()],
    density: Probability = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    rescale_by: RescaleBy = "l1",
    draws: Draws = 1,
) -> Merge:
    """DARE, then TIES's sign election: entries that disagree with the elected sign are dropped.

    `draws` masks are averaged before the election.
    """
    return _dare(weight, density, normalize, rescale, lambda_, rescale_by, draws, elect=True)


Epsilon = Annotated[float, PerModel(), Range(0.0, 0.5)]
_REFERENCE = "Deep et al., 'DELLA-Merging', arXiv 2406.11617"


def _check(density: Any, epsilon: Any) -> None:
    densities, epsilons = _values(density), _values(epsilon)
    if len(densities) == 1:
        densities = densities * len(epsilons)
    if len(epsilons) == 1:
        epsilons = epsilons * len(densities)
    # Sequences of unequal lengths are refused when the number of models is known.
    for d, e in zip(densities, epsilons, strict=False):
        if not is_concrete(d, e) or d <= 0 or d >= 1:
            continue
        if not (d - e > 0 and d + e < 1):
            raise OperatorError(
                f"della: density {d} with epsilon {e} leaves (0, 1), so keep probabilities would not be "
                f"probabilities; choose epsilon below {min(d, 1 - d):g}."
            )


def _values(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) or jnp.ndim(values) else [values]


def _della(
    weight: Any,
    density: Any,
    epsilon: Any,
    normalize: bool,
    rescale: bool,
    lambda_: Any,
    draws: int,
    elect: bool,
) -> Merge:
    density, epsilon = exact(density), exact(epsilon)
    _check(density, epsilon)
    prune = MagPrune(density, epsilon, int(draws))
    return task_vector_merge(weight, prune, normalize=normalize, scale=lambda_, elect=elect, rescale=rescale)


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    shares="elected",
    helps="DARE where large changes matter more than small ones, with conflicting signs.",
)
def della(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    epsilon: Epsilon = 0.15,
    draws: Draws = 1,
) -> Merge:
    """DELLA: keep entries with a probability that grows with their magnitude rank, elect signs, average.

    Keep probabilities run from `density - epsilon` for the smallest entry of a row to `density + epsilon`
    for the largest; equal magnitudes share the mean of theirs, where mergekit orders them arbitrarily.
    `draws` masks are averaged before the election. `int8_mask` is accepted for compatibility and changes
    nothing.

    Raises:
        OperatorError: `density - epsilon` or `density + epsilon` leaves (0, 1).
    """
    return _della(weight, density, epsilon, normalize, rescale, lambda_, draws, elect=True)


@operator(
    base="required",
    min_models=0,
    reference=_REFERENCE,
    helps="DELLA where signs seldom conflict.",
)
def della_linear(
    weight: Annotated[Any, PerModel()],
    density: Density = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    epsilon: Epsilon = 0.15,
    draws: Draws = 1,
) -> Merge:
    """DELLA without the sign election: prune by rank at random, rescale, add up.

    `draws` masks are averaged.
    """
    return _della(weight, density, epsilon, normalize, rescale, lambda_, draws, elect=False)
