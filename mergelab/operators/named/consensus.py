"""`consensus`: the summed task vector without the entries that only few tasks rely on."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.region import Region

__all__ = ["ConsensusSum", "consensus"]


@algebraic
class ConsensusSum(Reduction):
    """`s = sum_i x_i` where `agree` or more TALL masks `|x_i| > mask_lambda |s - x_i|` are set, else 0."""

    mask_lambda: Any = 0.4
    agree: int = dataclasses.field(default=2, metadata={"static": True})

    def check_models(self, models: int, operator: str) -> None:
        super().check_models(models, operator)
        if self.agree > models:
            raise OperatorError(
                f"{operator}: parameter 'agree' is {self.agree} for {models} model(s), the base not counted, "
                f"so no entry could be kept; choose at most {models}."
            )

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        total = sum(xs[1:], xs[0])
        votes = jnp.zeros(total.shape, jnp.int32)
        for x in xs:
            needed = rounded(coefficient(self.mask_lambda) * jnp.abs(total - x))
            votes = votes + (jnp.abs(x) > needed).astype(jnp.int32)
        return jnp.where(votes >= self.agree, total, jnp.float32(0))


@operator(
    base="required",
    reference="Wang et al., 'Localizing Task Information', arXiv 2405.07813",
    helps="Many tasks, to drop what only one of them (or none) relies on.",
)
def consensus(
    mask_lambda: Annotated[float, Range(0.0)] = 0.4,
    agree: Annotated[int, Range(0)] = 2,
    lambda_: float = 1.0,
) -> Merge:
    """Consensus merging: the summed task vector, where at least `agree` tasks' TALL masks keep the entry.

    Drops entries that no task (catastrophic weights) or one alone (selfish weights) relies on, which is what
    hurts when many tasks are summed. `agree=1` keeps what any task relies on.

    Raises:
        OperatorError: `agree` exceeds the number of models.
    """
    return Merge((), ConsensusSum(weights(mask_lambda), int(agree)), weights(lambda_))
