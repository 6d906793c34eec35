"""`wudi`: the matrix that interferes least with what each task's matrix reads."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.low_rank import exact_svd
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["LeastInterference", "wudi"]

Solver = Literal["exact", "gradient"]
Matrix = Float[Array, "rows columns"]
_State = tuple[jax.Array, Matrix, Matrix, Matrix, jax.Array]

_LOST = 1e-6
"""The fraction of the initial gradient below which descent stops: what float32 inputs resolve."""


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


@algebraic
class LeastInterference(MatrixReduction):
    """The minimizer of `sum_i |(m - x_i) x_i^T|^2 / |x_i|^2`; averages tensors that are not matrices.

    With `z_i = x_i / |x_i|` and `D = sum_i z_i^T z_i` its gradient is half `m D - sum_i x_i z_i^T z_i`.
    `exact` is the minimizer nearest to `s = sum_i x_i`, which is
    `s + sum_i (x_i - s) z_i^T z_i D^+`. `gradient` takes conjugate gradients from s, which tend to the same
    in steps that do not depend on the scale of the task vectors, and stops after `steps` or when the gradient
    has fallen to a millionth.
    """

    solver: Solver = dataclasses.field(default="exact", metadata={"static": True})
    steps: int = dataclasses.field(default=300, metadata={"static": True})

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The stacked matrices in float64, what is solved with them, and a Gram matrix's eigenvectors."""
        rows, columns = shape
        side = min(columns, models * rows)
        return 8 * (3 * models * rows * columns + 6 * rows * columns + 4 * side * side)

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        norms = [jnp.linalg.norm(x) for x in deltas]
        units = [x / jnp.where(n > 0, n, 1) for x, n in zip(deltas, norms, strict=True)]
        total = sum(deltas[1:], deltas[0])
        stacked = jnp.concatenate(units, axis=0)
        # What each task's own inputs are owed, (x_i - s) z_i^T, times what stands beside z_i in the sum.
        descends = self.solver == "gradient"
        beside = units if descends else jnp.split(_inverse_transposed(stacked), len(units))
        owed = [_chain(x - total, z.T, right) for x, z, right in zip(deltas, units, beside, strict=True)]
        residual = sum(owed[1:], owed[0])
        if descends:
            return total + _descended(residual, stacked, self.steps)
        return total + residual


def _chain(left: Matrix, middle: Matrix, right: Matrix) -> Matrix:
    """`left @ middle @ right`, of which the smaller product is made first: an embedding's rows are many."""
    if left.shape[0] > left.shape[1]:
        return _product(left, _product(middle, right))
    return _product(_product(left, middle), right)


def _inverse_transposed(z: Matrix) -> Matrix:
    """The transposed pseudo-inverse of z, `z (z^T z)^+ = (z z^T)^+ z`.

    In float64 by the eigenvectors of the smaller Gram matrix, which squares the condition of z, as do float32
    inputs' roundings; in float32 by its singular vectors.
    """
    if z.dtype != jnp.float64:
        left, singular, right = exact_svd(z)
        inverse = jnp.where(singular > 0, 1 / jnp.where(singular > 0, singular, 1), 0).astype(z.dtype)
        return _product(left * inverse[None, :], right)
    wide = z.shape[0] < z.shape[1]
    values, vectors = jnp.linalg.eigh(_product(z, z.T) if wide else _product(z.T, z))
    kept = values > max(z.shape) * jnp.finfo(z.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    if wide:
        return _product(vectors * inverse[None, :], _product(vectors.T, z))
    return _product(_product(z, vectors) * inverse[None, :], vectors.T)


def _descended(residual: Matrix, stacked: Matrix, steps: int) -> Matrix:
    """Conjugate gradients for `x z^T z = residual` from zero, with z the stacked matrices."""
    first = jnp.sum(residual * residual)
    gram = _product(stacked.T, stacked) if stacked.shape[0] >= stacked.shape[1] else None

    def curve(direction: Matrix) -> Matrix:
        """What the quadratic form makes of a direction; no product of rows by rows is made."""
        if gram is not None:
            return _product(direction, gram)
        return _product(_product(direction, stacked.T), stacked)

    def going(state: _State) -> jax.Array:
        step, _, _, _, square = state
        return (step < steps) & (square > _LOST**2 * first)

    def advanced(state: _State) -> _State:
        step, found, residual, direction, square = state
        curved = curve(direction)
        size = square / jnp.sum(direction * curved)
        residual = residual - size * curved
        after = jnp.sum(residual * residual)
        return step + 1, found + size * direction, residual, residual + (after / square) * direction, after

    start = (jnp.int32(0), jnp.zeros_like(residual), residual, residual, first)
    return jax.lax.while_loop(going, advanced, start)[1]


@operator(
    base="required",
    reference="Cheng et al., 'WUDI-Merging', arXiv 2503.08099",
    helps="Several tasks without data; on language models `solver=gradient` with few steps.",
)
def wudi(lambda_: float = 1.0, solver: Solver = "exact", steps: Annotated[int, Range(0)] = 300) -> Merge:
    """WUDI: the task vector with the least interference along what each task's matrix reads.

    `B + lambda m` with the m that minimizes `sum_i |(m - x_i) x_i^T|^2 / |x_i|^2` and is nearest to the sum.
    Takes no data: a task vector's rows stand for the inputs that the task's layer has seen. `gradient`
    approaches the exact solution in at most `steps` steps; fewer stay nearer to the plain sum. The exact
    solution is large along inputs that hardly any task reads: on siblings of a language model it can destroy
    what a few steps improve.
    """
    return Merge((), LeastInterference(solver=solver, steps=int(steps)), weights(lambda_))
