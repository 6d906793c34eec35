"""Low-rank approximations of a matrix: the exact truncated SVD, and a randomized one for large ones."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mergelab.errors import OperatorError

__all__ = [
    "LowRank",
    "balanced_factors",
    "decomposed_in",
    "exact_svd",
    "polar_factor",
    "randomized_svd",
    "rank_for_energy",
    "resolved_svd",
    "truncated_svd",
]


class LowRank(NamedTuple):
    """`left * singular @ right`, the factors of a low-rank matrix; left and right have orthonormal vectors.

    Attributes:
        left: left singular vectors, `[rows, rank]`.
        singular: singular values, `[rank]`, descending.
        right: right singular vectors, `[rank, columns]`.
    """

    left: Float[Array, "rows rank"]
    singular: Float[Array, " rank"]
    right: Float[Array, "rank columns"]

    def cut(self, rank: int) -> LowRank:
        """The first `rank` triples."""
        return LowRank(self.left[:, :rank], self.singular[:rank], self.right[:rank])


def decomposed_in(dtype: str) -> str:
    """The dtype to decompose a matrix in where `dtype` is wanted: TPUs have no wider one than float32."""
    return "float32" if jax.default_backend() == "tpu" else dtype


def exact_svd(matrix: Float[Array, "rows columns"], scale: Float[Array, ""] | None = None) -> LowRank:
    """The thin SVD of a matrix in its own dtype, without the triples that are nothing but rounding.

    Singular values up to `max(rows, columns)` roundings of the largest are not directions of the matrix:
    their vectors, which another program may choose otherwise, are zeros here.

    Args:
        matrix: `[rows, columns]`, float32 or wider.
        scale: the size of what the matrix was computed from, where it may be nothing but the rounding of it;
            the largest singular value if None.
    """
    left, singular, right = jnp.linalg.svd(matrix, full_matrices=False)
    noise = max(matrix.shape) * jnp.finfo(matrix.dtype).eps * (singular[0] if scale is None else scale)
    kept = (singular > noise).astype(matrix.dtype)
    return LowRank(left * kept[None, :], singular * kept, right * kept[:, None])


def resolved_svd(matrix: Float[Array, "rows columns"]) -> LowRank:
    """The thin SVD without the triples that the rounding of float32 entries may have made.

    The product of two thin factors has their rank again, though it was rounded.
    """
    # Independent roundings of all entries have a norm of about (sqrt(rows) + sqrt(columns)) times one.
    left, singular, right = jnp.linalg.svd(matrix, full_matrices=False)
    noise = 8 * math.sqrt(max(matrix.shape)) * 2.0**-24 * singular[0]
    kept = (singular > noise).astype(matrix.dtype)
    return LowRank(left * kept[None, :], singular * kept, right * kept[:, None])


def polar_factor(matrix: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """The orthogonal factor `P Q^T` of a matrix `P S Q^T`: the nearest whose singular values are 1 (or 0)."""
    left, _, right = exact_svd(matrix)
    return jnp.matmul(left, right, precision="highest")


@partial(jax.jit, static_argnames="rank")
def truncated_svd(matrix: Float[Array, "rows columns"], rank: int | None = None) -> LowRank:
    """The nearest matrix of at most `rank` in the Frobenius (and spectral) norm.

    Its squared error is the sum of the squares of the singular values left out (Eckart & Young 1936). Every
    left vector's entry of largest magnitude is positive, which settles the signs that an SVD leaves open.
    A sharded matrix is gathered; `randomized_svd` gathers only what has `rank` columns.

    Args:
        matrix: `[rows, columns]`, any float dtype; computed in float32.
        rank: how many triples are kept; all `min(rows, columns)` if None or larger.
    """
    left, singular, right = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    return _signed(LowRank(left, singular, right)).cut(singular.size if rank is None else rank)


@partial(jax.jit, static_argnames=("rank", "oversampling", "iterations"))
def randomized_svd(
    matrix: Float[Array, "rows columns"],
    rank: int,
    key: jax.Array,
    *,
    oversampling: int = 16,
    iterations: int = 4,
) -> LowRank:
    """Nearly the result of `truncated_svd`, by products of the matrix with thin random ones.

    The error exceeds the best one by a factor that falls towards 1 exponentially in `iterations`, the faster
    the more the singular values fall off after `rank`: Halko, Martinsson & Tropp, arXiv:0909.4061,
    algorithms 4.4 and 5.1. Costs `4 (iterations + 1) rows columns (rank + oversampling)` operations instead
    of about `20 rows columns min(rows, columns)`.

    Args:
        matrix: `[rows, columns]`, any float dtype; computed in float32.
        rank: how many triples are kept.
        key: a `jax.random` key: the draw of the starting subspace.
        oversampling: further dimensions of that subspace.
        iterations: subspace iterations, each with an orthonormalization of both sides.
    """
    matrix = matrix.astype(jnp.float32)
    width = min(rank + oversampling, *matrix.shape)
    precise = partial(jnp.matmul, precision="highest")
    basis, _ = jnp.linalg.qr(precise(matrix, jax.random.normal(key, (matrix.shape[1], width), jnp.float32)))
    for _ in range(iterations):
        rows, _ = jnp.linalg.qr(precise(matrix.T, basis))
        basis, _ = jnp.linalg.qr(precise(matrix, rows))
    left, singular, right = jnp.linalg.svd(precise(basis.T, matrix), full_matrices=False)
    return _signed(LowRank(precise(basis, left), singular, right)).cut(rank)


def rank_for_energy(singular: Float[np.ndarray, " rank"], energy: float, total: float) -> int:
    """The least rank whose triples hold the fraction `energy` of a matrix's squared Frobenius norm.

    Args:
        singular: its singular values, descending; all, or the first few.
        energy: the fraction, above 0 and at most 1.
        total: its squared Frobenius norm.

    Returns:
        Rank, at least 1; `singular.size` where even all of them hold less.

    Raises:
        OperatorError: `energy` is out of its range.
    """
    if not 0 < energy <= 1:
        raise OperatorError(
            f"the energy to keep is {energy!r} where a fraction above 0 and at most 1 was expected."
        )
    held = np.cumsum(np.square(singular, dtype=np.float64))
    # Rounding of float32 values leaves the sum of all a little beside the total.
    enough = np.flatnonzero(held >= energy * total * (1 - 1e-6))
    return int(enough[0]) + 1 if enough.size else singular.size


def balanced_factors(
    approximation: LowRank,
) -> tuple[Float[Array, "rows rank"], Float[Array, "rank columns"]]:
    """`B` and `A` with `B @ A` the approximation, the singular values shared out as square roots.

    Equal norms on both sides lose the least when the factors are rounded or trained on.
    """
    root = jnp.sqrt(approximation.singular)
    return approximation.left * root[None, :], root[:, None] * approximation.right


def _signed(svd: LowRank) -> LowRank:
    peaks = jnp.take_along_axis(svd.left, jnp.argmax(jnp.abs(svd.left), axis=0)[None, :], axis=0)
    signs = jnp.where(peaks < 0, jnp.float32(-1), jnp.float32(1))
    return LowRank(svd.left * signs, svd.singular, signs.T * svd.right)
