"""Searched codes are those of scikit-learn where it has them, and optimal where it has not."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.evaluation.sparse_coding import (
    amortization_gap,
    coding_target,
    elastic_net,
    hard_threshold,
    lasso,
    matching_pursuit,
    orthogonal_matching_pursuit,
)
from tests.interp.saes import random_sae

N, D, K = 60, 24, 5
RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(N, D)).astype(np.float32)
UNIT = ATOMS / np.linalg.norm(ATOMS, axis=1, keepdims=True)
X = RNG.normal(size=(7, D)).astype(np.float32)


def planted_codes(seed: int, k: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = np.zeros((20, N), np.float32)
    for row in codes:
        row[rng.choice(N, k, replace=False)] = rng.uniform(1, 2, k)
    return codes


def test_orthogonal_matching_pursuit_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import orthogonal_mp

    found = orthogonal_matching_pursuit(jnp.asarray(X), jnp.asarray(UNIT), K, tokens_at_once=3)
    peer = orthogonal_mp(UNIT.T.astype(np.float64), X.T.astype(np.float64), n_nonzero_coefs=K).T
    np.testing.assert_allclose(found, peer, atol=1e-4)
    assert (np.asarray(found) != 0).sum(axis=1).tolist() == [K] * len(X)
    # Atoms of other lengths are the same directions, with other codes.
    scaled = orthogonal_matching_pursuit(jnp.asarray(X), jnp.asarray(ATOMS), K)
    np.testing.assert_allclose(scaled @ ATOMS, peer @ UNIT, atol=1e-4)


def test_pursuits_survive_parallel_atoms() -> None:
    atoms = jnp.asarray(
        np.concatenate([UNIT, UNIT[:5] + 1e-4 * RNG.normal(size=(5, D)), UNIT[:5]]), jnp.float32
    )
    found = orthogonal_matching_pursuit(jnp.asarray(UNIT[:3] + UNIT[6:9]), atoms, 8)
    assert np.isfinite(np.asarray(found)).all()
    np.testing.assert_allclose(found @ atoms, UNIT[:3] + UNIT[6:9], atol=1e-3)


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.05, 0.0), (0.2, 0.4)])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_lasso_and_elastic_net_are_those_of_scikit_learn(l1: float, l2: float, nonnegative: bool) -> None:
    from sklearn.linear_model import ElasticNet

    found = elastic_net(jnp.asarray(X), jnp.asarray(UNIT), l1, l2, nonnegative=nonnegative)
    for row, codes in zip(X.astype(np.float64), np.asarray(found), strict=True):
        peer = ElasticNet(
            alpha=(l1 + l2) / D, l1_ratio=l1 / (l1 + l2), fit_intercept=False, positive=nonnegative,
            tol=1e-10, max_iter=100_000,
        ).fit(UNIT.T.astype(np.float64), row)  # fmt: skip
        np.testing.assert_allclose(codes, peer.coef_, atol=1e-4)
    if l2:  # where steps without momentum get there too
        plain = elastic_net(
            jnp.asarray(X), jnp.asarray(UNIT), l1, l2, nonnegative=nonnegative, accelerate=False
        )
        np.testing.assert_allclose(plain, found, atol=1e-4)
    else:
        same = lasso(jnp.asarray(X), jnp.asarray(UNIT), l1, nonnegative=nonnegative, tokens_at_once=2)
        np.testing.assert_allclose(same, found, atol=1e-4)


def test_acceleration_needs_fewer_steps() -> None:
    def objective(codes: Array) -> float:
        f = np.asarray(codes)
        return float(0.5 * np.square(X - f @ UNIT).sum() + 0.05 * np.abs(f).sum())

    best = objective(lasso(jnp.asarray(X), jnp.asarray(UNIT), 0.05))
    gaps = [
        objective(lasso(jnp.asarray(X), jnp.asarray(UNIT), 0.05, steps=60, accelerate=fast)) - best
        for fast in (False, True)
    ]
    assert gaps[1] < 0.2 * gaps[0]


@pytest.mark.parametrize(
    ("coder", "part", "error"),
    [
        (lambda x, atoms: orthogonal_matching_pursuit(x, atoms, 4), 1.0, 1e-5),
        (lambda x, atoms: lasso(x, atoms, 1e-3, nonnegative=True), 1.0, 1e-2),
        (lambda x, atoms: matching_pursuit(x, atoms, 20), 1.0, 1e-2),
        # It can end in another local minimum, as it does for some of these tokens.
        (lambda x, atoms: hard_threshold(x, atoms, 4, steps=300), 0.85, 0.25),
    ],
    ids=["orthogonal pursuit", "lasso", "pursuit", "hard threshold"],
)
def test_planted_codes_are_recovered(
    coder: Callable[[Array, Array], Array], part: float, error: float
) -> None:
    """Four of 60 atoms of width 48; of the four largest correlations one in five is another's."""
    rng = np.random.default_rng(5)
    atoms = rng.normal(size=(N, 48)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = planted_codes(1)
    x = codes @ atoms

    def hits(found: np.ndarray) -> float:
        support = np.argsort(-np.abs(found), axis=1)[:, :4]
        return float((np.take_along_axis(codes, support, axis=1) > 0).mean())

    found = np.asarray(coder(jnp.asarray(x), jnp.asarray(atoms)))
    assert hits(found) >= part > hits(x @ atoms.T)
    assert np.abs(found - codes).mean() < error * np.abs(codes).mean()


def test_single_steps_are_what_they_say() -> None:
    x, atoms = jnp.asarray(X), jnp.asarray(UNIT)
    along = X @ UNIT.T
    first = np.asarray(matching_pursuit(x, atoms, 1))
    best = np.abs(along).argmax(axis=1)
    np.testing.assert_allclose(first[np.arange(7), best], along[np.arange(7), best], rtol=1e-5)
    assert (first != 0).sum() == 7
    positive = np.asarray(matching_pursuit(x, atoms, 6, nonnegative=True))
    assert positive.min() == 0 and (np.asarray(matching_pursuit(x, atoms, 6)) < 0).any()
    kept = np.asarray(hard_threshold(x, atoms, K, steps=1))
    scale = np.linalg.norm(UNIT, 2) ** 2
    order = np.argsort(-np.abs(along), axis=1)[:, :K]
    expected = np.take_along_axis(along, order, axis=1) / scale
    np.testing.assert_allclose(np.take_along_axis(kept, order, axis=1), expected, rtol=1e-3)
    assert (kept != 0).sum() == 7 * K


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_searching_beats_a_random_encoder_and_the_gap_says_so(normalization: str) -> None:
    sae = random_sae(D, N, normalization=normalization)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(64, D)), jnp.float32)
    codes = orthogonal_matching_pursuit(coding_target(sae, x), sae.W_dec, 6)
    gap = amortization_gap(sae, x, codes)
    assert gap.searched_error < 0.5 < gap.encoder_error
    assert gap.searched_l0 == 6 and 0 < gap.encoder_l0 <= 6 and 0 <= gap.overlap < 0.5
    same = amortization_gap(sae, x, sae.encode(x))
    assert same.encoder_error == same.searched_error and same.overlap == 1
    if normalization == "none":
        error = np.square(np.asarray(x - sae(x))).sum()
        spread = np.square(np.asarray(x) - np.asarray(x).mean(axis=0)).sum()
        assert same.encoder_error == pytest.approx(error / spread, rel=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SAEError, match="cannot be coded"):
        lasso(jnp.asarray(X), jnp.asarray(UNIT.T), 0.1)
    with pytest.raises(SAEError, match="k is 25"):
        orthogonal_matching_pursuit(jnp.asarray(X), jnp.asarray(UNIT), 25)
    with pytest.raises(SAEError, match="0 or more"):
        lasso(jnp.asarray(X), jnp.asarray(UNIT), -0.1)
