"""Where a training starts: the encoder's scale."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mergelab.sae.training.initialize import best_initial_scale, initial_params
from mergelab.sae.variants import make_variant


@pytest.mark.parametrize(("n", "d", "k"), [(2048, 128, 16), (8192, 256, 32), (512, 64, 6), (256, 32, 32)])
def test_the_first_reconstructions_are_scaled_as_they_should_be(n: int, d: int, k: int) -> None:
    variant = make_variant("topk", d_in=d, n_latents=n, k=k)
    decoder = np.asarray(initial_params(variant, jax.random.key(0))["decoder"])
    x = np.random.default_rng(0).standard_normal((400, d)).astype(np.float32)
    codes = np.maximum(x @ decoder.T, 0)
    codes[codes < np.sort(codes, axis=1)[:, -k, None]] = 0
    made = codes @ decoder
    best = (x * made).sum() / (made * made).sum()  # least squares
    assert best_initial_scale(n, d, k) == pytest.approx(best, rel=0.02)
    assert best < 0.8  # unscaled, the codes overshoot


def test_the_encoder_is_the_transpose_times_its_scale() -> None:
    variant = make_variant("topk", d_in=16, n_latents=64, k=4)
    params = initial_params(variant, jax.random.key(0))
    scale = best_initial_scale(64, 16, 4)
    np.testing.assert_allclose(params["encoder"], scale * np.asarray(params["decoder"]), rtol=1e-6)
    unscaled = initial_params(variant, jax.random.key(0), scale=1.0)
    np.testing.assert_array_equal(unscaled["encoder"], params["decoder"])
    relu = initial_params(make_variant("relu", d_in=16, n_latents=64), jax.random.key(0))
    np.testing.assert_array_equal(relu["encoder"], relu["decoder"])
    free = initial_params(variant, jax.random.key(0), tie=False)
    assert np.abs(np.sum(np.asarray(free["encoder"]) * np.asarray(free["decoder"]), axis=1)).mean() < 0.4
    np.testing.assert_allclose(np.linalg.norm(free["encoder"], axis=1), 1, rtol=1e-5)
