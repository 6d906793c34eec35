"""Probes and principal components are those of scikit-learn."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SAEError, SiteError
from mergelab.interp.feature_geometry import feature_manifold, pca, similar_latents
from mergelab.interp.probes import Probe, fit_linear, fit_logistic, fit_ridge
from mergelab.sae.sae import SAE, SAEConfig
from tests.slow import slow_except

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(12, 12)) * np.linspace(0.2, 3, 12)
X = (RNG.normal(size=(150, 12)) @ MIXING + 5).astype(np.float32)
Y = (X @ RNG.normal(size=(12, 3)) * 0.3 + RNG.normal(size=(150, 3))).astype(np.float32)
LABELS = Y.mean(axis=0) < Y


def agree(found: Probe, weights: Any, bias: Any) -> None:
    scale = np.abs(weights).max()
    np.testing.assert_allclose(found.weights, np.asarray(weights).T, atol=1e-4 * max(scale, 1))
    np.testing.assert_allclose(found.bias, bias, atol=1e-4 * max(np.abs(bias).max(), 1))


def test_regressions_are_those_of_scikit_learn() -> None:
    from sklearn.linear_model import LinearRegression, Ridge

    x, y = X.astype(np.float64), Y.astype(np.float64)
    peer = LinearRegression().fit(x, y)
    agree(fit_linear(X, Y), peer.coef_, peer.intercept_)
    peer = Ridge(alpha=30.0).fit(x, y)
    found = fit_ridge(X, Y, 30.0)
    agree(found, peer.coef_, peer.intercept_)
    np.testing.assert_allclose(found(jnp.asarray(X)), peer.predict(x), atol=1e-3)
    assert np.abs(np.asarray(fit_ridge(X, Y, 3.0).weights) - peer.coef_.T).max() > 1e-3
    one = fit_ridge(X, Y[:, 1], 30.0)
    np.testing.assert_allclose(one.weights[:, 0], found.weights[:, 1], atol=1e-5)
    # Two equal columns share their weight: of all solutions the smallest.
    twice = fit_linear(np.concatenate([X, X[:, :1]], axis=1), Y[:, 0])
    np.testing.assert_allclose(twice.weights[0], twice.weights[-1], atol=1e-4)


@pytest.mark.parametrize("l2", slow_except([1.0], [1.0, 0.01]))
def test_logistic_probes_are_those_of_scikit_learn(l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    found = fit_logistic(X, LABELS, l2, targets_at_once=2)
    for target in range(3):
        peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(
            X.astype(np.float64), LABELS[:, target]
        )
        one = Probe(found.weights[:, target : target + 1], found.bias[target : target + 1])
        agree(one, peer.coef_, peer.intercept_)
    assert np.abs(np.asarray(found.weights)).max() > 0.1


def test_separable_targets_have_finite_probes() -> None:
    x = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
    found = fit_logistic(x, x[:, 0] > 0, 1e-3)
    assert np.isfinite(np.asarray(found.weights)).all()
    assert (np.asarray(found(jnp.asarray(x)))[:, 0] > 0).tolist() == (x[:, 0] > 0).tolist()


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(SiteError, match=r"activations of shape \[150, 12\]"):
        fit_linear(X, Y[:-1])
    with pytest.raises(SiteError, match="target 1 is the same in all 150 rows"):
        fit_logistic(X, LABELS & np.array([True, False, True]))
    with pytest.raises(SiteError, match="more than 0"):
        fit_logistic(X, LABELS, 0.0)


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    peer = PCA(4).fit(X.astype(np.float64))
    found = pca(jnp.asarray(X), 4)
    np.testing.assert_allclose(found.ratios, peer.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(found.variances, peer.explained_variance_, rtol=1e-4)
    signs = np.sign((np.asarray(found.components) * peer.components_).sum(axis=1))
    np.testing.assert_allclose(found.components, peer.components_ * signs[:, None], atol=1e-4)
    np.testing.assert_allclose(found.project(jnp.asarray(X)), peer.transform(X) * signs, atol=1e-3)


def test_a_planted_circle_is_found() -> None:
    """Twelve latents around a circle, in a plane of a wider space, and twelve that lie outside it."""
    rng = np.random.default_rng(1)
    angles = np.arange(12) * np.pi / 6
    plane = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane[:, :2].T
    rows = np.concatenate([ring, rng.normal(size=(12, 16)) @ plane[:, 2:] @ plane[:, 2:].T]).astype(
        np.float32
    )
    sae = SAE(jnp.asarray(rows.T), jnp.full(24, -0.8), jnp.asarray(rows), jnp.zeros(16), SAEConfig("relu"))
    theta = rng.uniform(0, 2 * np.pi, 300)
    x = np.stack([np.cos(theta), np.sin(theta)], axis=1) @ plane[:, :2].T
    x[::3] = rng.normal(size=(100, 14)) @ plane[:, 2:].T  # tokens without the feature
    found = feature_manifold(sae, x.astype(np.float32), range(12), k=3, batch=128)
    assert found.rows.size == 200 and not (found.rows % 3 == 0).any()
    assert float(found.pca.ratios[:2].sum()) > 0.999
    turned = np.angle(np.exp(1j * (np.arctan2(found.points[:, 1], found.points[:, 0]) - theta[found.rows])))
    mirrored = np.angle(np.exp(1j * (np.arctan2(found.points[:, 1], found.points[:, 0]) + theta[found.rows])))
    spread = min(1 - abs(np.exp(1j * difference).mean()) for difference in (turned, mirrored))
    assert spread < 0.01, "the angle in the plane of the components is the angle of the feature"
    order, cosines = similar_latents(sae, 3, 3)
    assert set(order.tolist()) == {2, 3, 4} and cosines[1] == pytest.approx(np.cos(np.pi / 6), abs=1e-5)
    with pytest.raises(SAEError, match="active on 0 of 100 tokens"):
        feature_manifold(sae, np.zeros((100, 16)), range(12))
