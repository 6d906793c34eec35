"""The one KL divergence is scipy's, and keeps its numbers where distributions are far apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from mergelab.activations.losses import kl_divergence, kl_of_log_probabilities


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_kl_is_that_of_float64(scale: float) -> None:
    p, q = np.random.default_rng(0).normal(size=(2, 4, 3, 50)) * scale
    p, q = p.astype(np.float32), q.astype(np.float32)
    logs = [log_softmax(x.astype(np.float64), axis=-1) for x in (p, q)]
    expected = rel_entr(*np.exp(logs)).sum(axis=-1)
    found = np.asarray(kl_divergence(jnp.asarray(p), jnp.asarray(q)))
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (
        np.abs(kl_divergence(jnp.asarray(q), jnp.asarray(p)) - expected).max() > 1e-3 * scale
    )  # not symmetric
    of_logs = kl_of_log_probabilities(jax.nn.log_softmax(jnp.asarray(p)), jax.nn.log_softmax(jnp.asarray(q)))
    np.testing.assert_array_equal(found, of_logs)


def test_kl_of_equal_logits_up_to_a_shift_is_zero() -> None:
    p = jnp.asarray(np.random.default_rng(1).normal(size=(5, 20)), jnp.float32)
    np.testing.assert_allclose(kl_divergence(p, p + 2.0), np.zeros(5), atol=1e-6)
