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
    "polar_and_singular",
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


def exact_svd(
    matrix: Float[Array, "rows columns"],
    scale: Float[Array, ""] | None = None,
    rank: int | None = None,
) -> LowRank:
    """The thin SVD of a matrix in its own dtype, without the triples that are nothing but rounding.

    Singular values up to `max(rows, columns)` roundings of the largest are not directions of the matrix:
    their vectors, which another program may choose otherwise, are zeros here. Large float64 matrices are
    decomposed by way of their Gram matrix, several times as fast, unless a singular value is so small that
    its vectors would be off by more than 1e-6: then LAPACK's SVD takes over.

    Args:
        matrix: `[rows, columns]`, float32 or wider.
        scale: the size of what the matrix was computed from, where it may be nothing but the rounding of it;
            the largest singular value if None.
        rank: how many triples are kept; all `min(rows, columns)` if None.
    """
    svd = _thin_svd(matrix, min(matrix.shape) if rank is None else rank)
    largest = svd.singular[0] if scale is None else scale
    return _without_noise(svd, max(matrix.shape) * jnp.finfo(matrix.dtype).eps * largest)


def resolved_svd(matrix: Float[Array, "rows columns"], *, rank: int | None = None) -> LowRank:
    """The thin SVD without the triples that the rounding of float32 entries may have made.

    The product of two thin factors has their rank again, though it was rounded.
    """
    # Independent roundings of all entries have a norm of about (sqrt(rows) + sqrt(columns)) times one.
    svd = _thin_svd(matrix, min(matrix.shape) if rank is None else rank)
    return _without_noise(svd, 8 * math.sqrt(max(matrix.shape)) * 2.0**-24 * svd.singular[0])


def _without_noise(svd: LowRank, noise: Float[Array, ""]) -> LowRank:
    kept = (svd.singular > noise).astype(svd.singular.dtype)
    return LowRank(svd.left * kept[None, :], svd.singular * kept, svd.right * kept[:, None])


def polar_factor(matrix: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """The orthogonal factor `P Q^T` of a matrix `P S Q^T`: the nearest whose singular values are 1 (or 0)."""
    return polar_and_singular(matrix)[0]


def polar_and_singular(
    matrix: Float[Array, "rows columns"],
) -> tuple[Float[Array, "rows columns"], Float[Array, " rank"]]:
    """The orthogonal factor of a matrix, and its singular values, those of rounding as zeros.

    Large float64 matrices by way of their Gram matrix where `exact_svd` may.
    """

    def by_svd(matrix: Array) -> tuple[Array, Array]:
        svd = LowRank(*jnp.linalg.svd(matrix, full_matrices=False))
        noise = max(matrix.shape) * jnp.finfo(matrix.dtype).eps * svd.singular[0]
        left, singular, right = _without_noise(svd, noise)
        return jnp.matmul(left, right, precision="highest"), singular

    if not _is_large(matrix):
        return by_svd(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        factor, singular = polar_and_singular(matrix.T)
        return factor.T, singular
    singular, vectors = _of_gram(matrix)

    def by_gram(matrix: Array) -> tuple[Array, Array]:
        root = jnp.matmul(vectors / singular[None, :], vectors.T, precision="highest")
        return jnp.matmul(matrix, root, precision="highest"), singular

    return jax.lax.cond(_is_resolved(singular), by_gram, by_svd, matrix)


_LARGE = 128
"""Least number of rows and columns from which a Gram matrix is worth two ways to compute the same."""
_ERROR = 1e-6
"""Error of singular vectors, relative to 1, up to which a Gram matrix will do."""


def _is_large(matrix: Array) -> bool:
    return min(matrix.shape) >= _LARGE and matrix.dtype == jnp.float64


def _of_gram(
    matrix: Float[Array, "rows columns"],
) -> tuple[Float[Array, " columns"], Float[Array, "columns columns"]]:
    """Singular values, descending, and right singular vectors as columns, of a matrix not wider than tall."""
    values, vectors = jnp.linalg.eigh(jnp.matmul(matrix.T, matrix, precision="highest"))
    return jnp.sqrt(jnp.maximum(values[::-1], 0.0)), vectors[:, ::-1]


def _is_resolved(singular: Float[Array, " rank"]) -> Array:
    """Whether squaring leaves the vectors of these singular values right: the error grows with the square."""
    return singular[-1] >= math.sqrt(jnp.finfo(singular.dtype).eps / _ERROR) * singular[0]


def _thin_svd(matrix: Float[Array, "rows columns"], rank: int) -> LowRank:
    """The leading triples of a matrix, those of rounding among them."""

    def by_svd(matrix: Array) -> LowRank:
        return LowRank(*jnp.linalg.svd(matrix, full_matrices=False)).cut(rank)

    if not _is_large(matrix):
        return by_svd(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        left, singular, right = _thin_svd(matrix.T, rank)
        return LowRank(right.T, singular, left.T)
    singular, vectors = _of_gram(matrix)
    vectors = vectors[:, :rank]

    def by_gram(matrix: Array) -> LowRank:
        left = jnp.matmul(matrix, vectors, precision="highest")
        lengths = jnp.linalg.norm(left, axis=0)  # one rounding nearer than the roots of eigenvalues
        return LowRank(left / lengths[None, :], lengths, vectors.T)

    return jax.lax.cond(_is_resolved(singular[:rank]), by_gram, by_svd, matrix)


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
