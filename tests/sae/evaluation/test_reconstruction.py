"""Reconstruction figures against plain formulas over all rows at once, and on cases known by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sklearn.metrics import r2_score

from mergelab.errors import SAEError
from mergelab.sae.evaluation.reconstruction import (
    Reconstruction,
    Totals,
    density_histogram,
    evaluate_reconstruction,
)


@dataclass
class Linear:
    """`relu(x @ encoder)`, decoded linearly, with a constant added."""

    encoder: np.ndarray
    decoder: np.ndarray
    bias: np.ndarray

    def encode(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ self.encoder, 0)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes @ self.decoder + self.bias


def _case(offset: float = 0.0) -> tuple[Linear, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) * np.arange(1, 7) + offset
    coder = Linear(rng.standard_normal((6, 9)), 0.1 * rng.standard_normal((9, 6)), rng.standard_normal(6))
    coder.encoder[:, 4] = 0  # a latent that is never active
    return coder, x


def _whole(coder: Linear, x: np.ndarray) -> Reconstruction:
    return evaluate_reconstruction(coder, [x])


def test_figures_agree_with_plain_formulas() -> None:
    coder, x = _case()
    codes = coder.encode(x)
    out = coder.decode(codes)
    found = _whole(coder, x)
    assert found.rows == 400
    assert found.mse == pytest.approx(((x - out) ** 2).mean())
    assert found.nmse == pytest.approx(((x - out) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert found.explained_variance == pytest.approx(1 - (x - out).var(0).sum() / x.var(0).sum())
    # scikit-learn's score, weighted by variance, counts a constant error: it is 1 - nmse.
    assert 1 - found.nmse == pytest.approx(r2_score(x, out, multioutput="variance_weighted"))
    assert found.explained_variance > 1 - found.nmse + 0.01
    assert found.l0 == pytest.approx((codes > 0).sum(1).mean())
    assert found.alive == pytest.approx(8 / 9)
    np.testing.assert_allclose(found.densities, (codes > 0).mean(0))
    norm, out_norm = np.linalg.norm(x, axis=1), np.linalg.norm(out, axis=1)
    assert found.cosine == pytest.approx(((x * out).sum(1) / (norm * out_norm)).mean())
    assert found.l2_ratio == pytest.approx((out_norm / norm).mean())
    assert found.relative_bias == pytest.approx((out**2).sum() / (x * out).sum())


def test_batches_of_any_length_give_what_one_gives() -> None:
    coder, x = _case()
    found, whole = evaluate_reconstruction(coder, [x[:7], x[7:300], x[300:]]), _whole(coder, x)
    assert found.scalars() == pytest.approx(whole.scalars(), rel=1e-9)
    np.testing.assert_array_equal(found.densities, whole.densities)
    assert _whole(coder, x[:300]).nmse != pytest.approx(whole.nmse, rel=1e-4)


def test_a_mean_far_above_the_spread_costs_no_digits() -> None:
    _, x = _case()
    out = x + np.random.default_rng(1).standard_normal(x.shape)
    near = Totals.zero(x, 1).add(x, out, np.ones((400, 1))).result()
    far = Totals.zero(x + 1e6, 1).add(x + 1e6, out + 1e6, np.ones((400, 1))).result()
    assert far.nmse == pytest.approx(near.nmse, rel=1e-8)
    assert far.explained_variance == pytest.approx(near.explained_variance, rel=1e-8)


def test_known_answers() -> None:
    _, x = _case(offset=2.0)
    ones = np.ones((400, 3))
    exact = Totals.zero(x, 3).add(x, x, ones).result()
    assert (exact.nmse, exact.explained_variance, exact.l0, exact.alive) == (0, 1, 3, 1)
    assert (exact.cosine, exact.l2_ratio, exact.relative_bias) == pytest.approx((1, 1, 1))
    mean = Totals.zero(x, 3).add(x, np.broadcast_to(x.mean(0), x.shape), 0 * ones).result()
    assert mean.nmse == pytest.approx(1) and mean.explained_variance == pytest.approx(0)
    assert (mean.l0, mean.alive) == (0, 0)
    # Shrunk to three quarters: the optimal rescaling of the reconstruction is known.
    shrunk = Totals.zero(x, 3).add(x, 0.75 * x, ones).result()
    assert shrunk.relative_bias == pytest.approx(0.75) and shrunk.l2_ratio == pytest.approx(0.75)
    nothing = Totals.zero(x, 3).add(x, 0 * x, 0 * ones).result()
    assert np.isnan(nothing.relative_bias) and nothing.cosine == 0


def test_a_constant_error_is_seen_by_nmse_alone() -> None:
    _, x = _case()
    found = Totals.zero(x, 1).add(x, x + 3.0, np.ones((400, 1))).result()
    assert found.explained_variance == pytest.approx(1) and found.nmse > 0.5


def test_sparse_codes_count_as_dense_ones() -> None:
    _, x = _case()
    rng = np.random.default_rng(2)
    indices = np.argsort(rng.random((400, 50)), axis=1)[:, :4]
    values = np.maximum(rng.standard_normal((400, 4)), 0)  # a chosen latent may still be 0: not active
    dense = np.zeros((400, 50))
    np.put_along_axis(dense, indices, values, axis=1)
    sparse = Totals.zero(x, 50).add(x, x, (values, indices)).result()
    np.testing.assert_array_equal(sparse.densities, Totals.zero(x, 50).add(x, x, dense).result().densities)
    assert sparse.l0 == pytest.approx(2, abs=0.2)


def test_targets_may_be_other_activations() -> None:
    coder, x = _case()
    found = evaluate_reconstruction(coder, [x], targets=[2 * x])
    out = coder.decode(coder.encode(x))
    assert found.mse == pytest.approx(((2 * x - out) ** 2).mean())
    with pytest.raises(ValueError, match="zip"):
        evaluate_reconstruction(coder, [x, x], targets=[x])


def test_densities_are_counted_by_powers_of_ten() -> None:
    densities = np.array([0.0, 0.0, 1e-9, 2e-3, 5e-3, 0.05, 0.5, 1.0])
    counts, never = density_histogram(densities, np.arange(-3.0, 0.5, 1.0))
    assert (counts.tolist(), never) == ([3, 1, 2], 2)


def test_what_does_not_fit_together_is_refused() -> None:
    _, x = _case()
    totals = Totals.zero(x, 5)
    with pytest.raises(SAEError, match="do not fit together"):
        totals.add(x, x[:, :5], np.ones((400, 5)))
    with pytest.raises(SAEError, match=r"codes have shape \[400, 4\]; expected \[400, 5\]"):
        totals.add(x, x, np.ones((400, 4)))
    with pytest.raises(SAEError, match="sparse codes have values"):
        totals.add(x, x, (np.ones((400, 2)), np.ones((400, 3), int)))
    with pytest.raises(SAEError, match="no activations"):
        evaluate_reconstruction(_case()[0], [])
    with pytest.raises(SAEError, match="do not vary"):
        totals.add(x[:1], x[:1], np.ones((1, 5))).result()
