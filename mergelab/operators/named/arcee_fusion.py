"""`arcee_fusion`: take over only the entries whose change matters, by divergence of row distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.arithmetic import rounded, row_sum
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator
from mergelab.operators.measures import Measure, Rank
from mergelab.operators.order_statistics import ordered_key, ordered_value
from mergelab.operators.region import Region

__all__ = ["ArceeFusion", "arcee_fusion"]


def _softmax(x: jax.Array) -> jax.Array:
    exponentials = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return exponentials / row_sum(exponentials)


@algebraic
class ArceeFusion(Reduction):
    """`B + d` where `|d| KL(softmax X || softmax B)` reaches median + 1.5 interquartile ranges, else `B`.

    The divergence is taken row by row along the last axis; the quartiles are exact order statistics
    `sorted[int(q (n - 1))]` of the whole tensor at any size.
    """

    granularity: ClassVar[Granularity] = "row"

    def measures(self) -> tuple[Measure, ...]:
        return (Rank(ArceeFusion.keys, ArceeFusion.quartiles, values=True),)

    def importance(self, delta: jax.Array, base: jax.Array) -> jax.Array:
        """`|delta|` times the row's divergence."""
        p, q = (_softmax(v) + jnp.float32(1e-8) for v in (base + delta, base))
        return rounded(jnp.abs(delta) * row_sum(rounded(p * jnp.log(p / q))))

    def keys(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Importances as sortable keys."""
        return (ordered_key(jax.lax.stop_gradient(self.importance(xs[0], base))),)

    def quartiles(self, known: Known, size: int, models: int) -> Sequence[Sequence[int]]:
        """Ranks from the top of the quartiles at .25, .5 and .75."""
        return [[size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]]

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        assert base is not None
        low, middle, high = (ordered_value(jnp.asarray(s.threshold, jnp.uint32)) for s in known[0][0])
        threshold = middle + 1.5 * (high - low)
        return jnp.where(self.importance(xs[0], base) >= threshold, xs[0], jnp.float32(0))


@operator(
    base="required",
    max_models=1,
    reference="mergekit 0.1.5, method arcee_fusion",
    lone="copy",
    absent="copy",
    helps="One fine-tune whose main changes the base should take over and no more.",
)
def arcee_fusion() -> Merge:
    """Keeps the base and takes over the other model's most important changes."""
    return Merge((), ArceeFusion())
