"""The fit gives back the law that made a surface, and says what it cannot fit."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.sae.evaluation.scaling_law import ScalingLaw, fit_scaling_law

PAPER = ScalingLaw(-0.50, 0.26, -0.017, -0.042, -1.32, -0.085)
N, K = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(11, 22, 2), 2.0 ** np.arange(3, 10)))


def test_a_synthetic_surface_is_recovered() -> None:
    other = ScalingLaw(0.3, 0.1, -0.12, -0.02, -2.5, -0.3)
    for law in (PAPER, other):
        loss = law(N, K)
        found = fit_scaling_law(N, K, loss)
        np.testing.assert_allclose(found(N, K), loss, rtol=1e-7)
        np.testing.assert_allclose(astuple(found), astuple(law), rtol=1e-3, atol=1e-4)
        assert found(1e8, 32) == pytest.approx(law(1e8, 32), rel=1e-4)


def test_noise_moves_the_fit_by_as_much() -> None:
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(N)))
    found = fit_scaling_law(N, K, PAPER(N, K) * noise)
    off = np.abs(np.log(found(N, K) / PAPER(N, K)))
    assert 1e-4 < off.max() < 0.02
    assert PAPER(2.0**15, 64) == pytest.approx(
        np.exp(-0.5 + 0.26 * np.log(64) - 0.017 * np.log(2**15) - 0.042 * np.log(64) * np.log(2**15))
        + np.exp(-1.32 - 0.085 * np.log(64))
    )


def test_what_cannot_be_fitted_is_said() -> None:
    with pytest.raises(SAEError, match="six coefficients"):
        fit_scaling_law(N[:5], K[:5], PAPER(N[:5], K[:5]))
    with pytest.raises(SAEError, match="not above 0"):
        fit_scaling_law(N, K, PAPER(N, K) - 1)
