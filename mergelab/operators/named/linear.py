"""Weighted averages of models, and the copy of one."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from mergelab.errors import OperatorError
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator, total_weight, weights
from mergelab.operators.reductions import Mean, WeightedSum

__all__ = ["linear", "passthrough", "uniform", "wise_ft"]


@operator(
    base="as_input",
    reference="Wortsman et al., 'Model soups', arXiv 2203.05482",
    helps="Fine-tunes of one base that differ by seed, data order or rate; the first merge to try.",
)
def linear(weight: Annotated[Any, PerModel()], normalize: bool = True) -> Merge:
    """Weighted average of the models: `sum_i w_i X_i`, divided by `sum_i w_i` if `normalize`.

    Raises:
        OperatorError: `normalize` and the weights sum to zero.
    """
    if normalize and total_weight(weight) == 0:
        raise OperatorError(
            "linear: the weights sum to 0, so they cannot be normalized; change a weight or set "
            "`normalize: false`."
        )
    w = weights(weight)
    if not normalize:
        return Merge((), WeightedSum(w), deltas=False)
    return Merge((), WeightedSum(w / w.sum()) if w.ndim else Mean(w), deltas=False)


@operator(
    base="as_input",
    reference="Wortsman et al., 'Model soups', arXiv 2203.05482",
    helps="Many fine-tunes of one base on the same task, none of them bad.",
)
def uniform() -> Merge:
    """The uniform soup: the plain mean of the models."""
    return Merge((), Mean(np.float32(1)), deltas=False)


@operator(
    base="required",
    max_models=1,
    reference="Wortsman et al., WiSE-FT, arXiv 2109.01903",
    strength="alpha",
    helps="One fine-tune that lost robustness (`alpha` < 1), or that stopped too early (`alpha` > 1).",
)
def wise_ft(alpha: float) -> Merge:
    """Moves from the base towards (or, for `alpha` above 1, beyond) one fine-tune: `(1 - a) B + a X`.

    `alpha` in [0, 1] is WiSE-FT; `alpha` > 1 is ExPO's extrapolation (Zheng et al., arXiv 2404.16792).
    """
    return Merge((), WeightedSum(), scale=alpha)


@operator(
    base="as_input",
    max_models=1,
    reference="mergekit 0.1.5, method passthrough",
    integers="first",
    copies_unless="scale",
    strength="scale",
    helps="Layers and tensors taken as they are: frankenmerges, scaled copies.",
)
def passthrough(scale: float | None = None) -> Merge:
    """Copies the single model's tensors, multiplied by `scale` if given."""
    return Merge((), WeightedSum(weights(1.0 if scale is None else scale)), deltas=False)
