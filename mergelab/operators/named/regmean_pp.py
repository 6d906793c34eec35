"""`regmean_pp`: `regmean` by Gram matrices of inputs that merged layers make."""

from __future__ import annotations

from typing import Annotated

from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.named.regmean import RegressionMean

__all__ = ["regmean_pp"]


@operator(
    base="optional",
    reference="Nguyen et al., 'RegMean++', arXiv 2508.03121",
    statistics="merged_gram",
    helps="The same as regmean for deep models: each layer is fitted to the merged ones before it.",
)
def regmean_pp(off_diagonal: Annotated[float, Range(0.0, 1.0)] = 1.0) -> Merge:
    """RegMean++: RegMean on the inputs that each layer has once the layers before it are merged.

    The Gram matrices are made for all models together, by `mergelab statistics --kind merged_gram`, with the
    same `off_diagonal`.
    """
    return Merge((), RegressionMean(weights(off_diagonal)))
