"""Low-rank approximation: Eckart and Young's error, determinism, energy, and the randomized variant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.compat import enable_x64
from mergelab.errors import OperatorError
from mergelab.operators.low_rank import (
    LowRank,
    balanced_factors,
    exact_svd,
    polar_and_singular,
    randomized_svd,
    rank_for_energy,
    truncated_svd,
)


def matrix(rows: int, columns: int, seed: int = 0, decay: float = 0.8) -> np.ndarray:
    """A matrix with singular values `decay ** i`."""
    draw = np.random.default_rng(seed)
    short = min(rows, columns)
    left, _ = np.linalg.qr(draw.standard_normal((rows, short)))
    right, _ = np.linalg.qr(draw.standard_normal((columns, short)))
    return ((left * decay ** np.arange(short)) @ right.T).astype(np.float32)


def product(svd: LowRank) -> np.ndarray:
    left, singular, right = (np.asarray(part, np.float64) for part in svd)
    return (left * singular) @ right


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 5))
def test_the_error_is_the_tail_of_the_spectrum(rows: int, columns: int, rank: int, seed: int) -> None:
    full = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    spectrum = np.linalg.svd(full.astype(np.float64), compute_uv=False)
    svd = truncated_svd(full, rank)
    assert svd.singular.shape == (min(rank, rows, columns),)
    error = np.linalg.norm(full - product(svd))
    np.testing.assert_allclose(error, np.linalg.norm(spectrum[rank:]), rtol=1e-4, atol=2e-5)


def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    full = matrix(20, 15)
    best = np.linalg.norm(full - product(truncated_svd(full, 4)))
    draw = np.random.default_rng(3)
    for _ in range(20):
        svd = truncated_svd(full, 4)
        nudged = svd._replace(left=svd.left + 0.01 * draw.standard_normal(svd.left.shape, np.float32))
        assert np.linalg.norm(full - product(nudged)) > best


def test_signs_are_settled() -> None:
    full = matrix(30, 20)
    svd, mirrored = truncated_svd(full, 5), truncated_svd(-full, 5)
    left = np.asarray(svd.left)
    assert (left[np.abs(left).argmax(0), range(5)] > 0).all()
    # The mirrored matrix has the same left vectors once their signs are settled; the right ones turn.
    np.testing.assert_allclose(mirrored.left, svd.left, atol=1e-5)
    np.testing.assert_allclose(mirrored.right, -svd.right, atol=1e-5)


def test_balanced_factors_multiply_to_the_approximation_and_have_equal_norms() -> None:
    svd = truncated_svd(matrix(30, 20), 5)
    b, a = balanced_factors(svd)
    np.testing.assert_allclose(b @ a, product(svd), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_rank_for_energy_is_the_least_that_holds_it(energy: float) -> None:
    spectrum = np.array([3.0, 2.0, 1.0, 0.5], np.float32)
    total = float((spectrum**2).sum())
    rank = rank_for_energy(spectrum, energy, total)
    held = [float((spectrum[:r] ** 2).sum()) / total for r in range(1, 5)]
    assert held[rank - 1] >= energy
    assert rank == 1 or held[rank - 2] < energy
    assert rank_for_energy(spectrum[:1], energy, total) == 1


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, float("nan")])
def test_energies_out_of_range_are_refused(energy: float) -> None:
    with pytest.raises(OperatorError, match="fraction above 0 and at most 1"):
        rank_for_energy(np.ones(3, np.float32), energy, 3.0)


def test_the_randomized_one_is_nearly_best_and_repeatable() -> None:
    full = matrix(60, 48, decay=0.9)
    key = jax.random.key(7)
    svd = randomized_svd(full, 10, key)
    best = truncated_svd(full, 10)
    np.testing.assert_allclose(svd.singular, best.singular, rtol=1e-4)
    ratio = np.linalg.norm(full - product(svd)) / np.linalg.norm(full - product(best))
    assert 1 - 1e-6 <= ratio < 1.001
    assert np.array_equal(svd.left, randomized_svd(full, 10, key).left)
    # The control: with no iteration and no further dimensions the subspace is visibly worse.
    rough = randomized_svd(full, 10, key, oversampling=0, iterations=0)
    assert np.linalg.norm(full - product(rough)) > 1.02 * np.linalg.norm(full - product(best))


def test_a_matrix_of_the_rank_is_found_exactly_by_both() -> None:
    full = matrix(64, 48, decay=0.5)
    exact = product(truncated_svd(full, 6)).astype(np.float32)
    for svd in (truncated_svd(exact, 6), randomized_svd(exact, 6, jax.random.key(0))):
        np.testing.assert_allclose(product(svd), exact, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_sharded_matrices_give_the_same(method: str) -> None:
    full = matrix(64, 40)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    sharded = jax.device_put(jnp.asarray(full), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(32, 10)}
    one, many = (
        truncated_svd(m, 5) if method == "exact" else randomized_svd(m, 5, jax.random.key(1))
        for m in (jnp.asarray(full), sharded)
    )
    np.testing.assert_allclose(product(one), product(many), atol=1e-5)


SPECTRA = {
    "resolved": np.logspace(0, -4, 130),
    "too small to be squared": np.logspace(0, -7, 130),
    "of low rank": np.r_[np.linspace(1, 0.5, 40), np.zeros(90)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_large_matrices_are_decomposed_as_numpy_does(spectrum: str, wide: bool) -> None:
    """By way of their Gram matrix where that resolves the singular values, by an SVD elsewhere."""
    draw, singular = np.random.default_rng(3), SPECTRA[spectrum]
    left, right = (np.linalg.qr(draw.standard_normal((n, 130)))[0] for n in (140, 130))
    full = (left * singular) @ right.T
    kept = singular > 0
    factor = left[:, kept] @ right[:, kept].T
    full, factor = (full.T, factor.T) if wide else (full, factor)
    with enable_x64(True):
        found, values = jax.jit(polar_and_singular)(jnp.asarray(full))
        svd = jax.jit(exact_svd, static_argnames="rank")(jnp.asarray(full), rank=30)
    tolerance = 1e-8 if spectrum == "too small to be squared" else 1e-9
    np.testing.assert_allclose(found, factor, atol=tolerance)
    np.testing.assert_allclose(values, singular, atol=1e-13)
    top = (left[:, :30] * singular[:30]) @ right[:, :30].T
    np.testing.assert_allclose(product(svd), top.T if wide else top, atol=1e-12)
