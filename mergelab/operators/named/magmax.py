"""`magmax`: entry by entry, the change of the model that changed it most."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator, weights
from mergelab.operators.region import Region

__all__ = ["LargestMagnitude", "magmax"]


@algebraic
class LargestMagnitude(Reduction):
    """The entry of largest magnitude; of equal ones, that of the later model."""

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        chosen = xs[0]
        for x in xs[1:]:
            chosen = jnp.where(jnp.abs(x) >= jnp.abs(chosen), x, chosen)
        return chosen


@operator(
    base="required",
    reference="Marczak et al., 'MagMax', arXiv 2407.06322",
    helps="Models fine-tuned one after the other on tasks of one kind (continual learning).",
)
def magmax(lambda_: float = 0.5) -> Merge:
    """MagMax: `B + lambda t`, where t is entry by entry the task vector of largest magnitude.

    Meant for models fine-tuned one after another; of equal magnitudes the later model's is taken. The default
    `lambda` of 0.5 is the authors' for models fine-tuned independently.
    """
    return Merge((), LargestMagnitude(), weights(lambda_))
