"""Steering vectors are what they say, and turn a trained model's text towards a domain."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.capture import capture
from mergelab.decoding import generate
from mergelab.decoding.samplers import sample
from mergelab.errors import SAEError, SiteError
from mergelab.interp.steering import SteeringVector, add_vector, latent_direction, steering_vector
from mergelab.interp.vectors import mean_difference, principal_difference, project_out, unit, with_strength
from tests.interp.domains import LENGTH, Trained, lines, neutral, share_of
from tests.interp.running import sites_of
from tests.interp.saes import random_sae

SITE = "blocks.0.resid_post"


def test_capture_reads_what_the_model_holds(domains: Trained) -> None:
    tokens = lines(0, 5)
    mask = np.arange(LENGTH)[None] < np.array([16, 3, 9, 1, 16])[:, None]
    found = sites_of(domains.model, domains.params, tokens, "blocks.*.resid_post", mask=mask)
    every = capture(domains.model, domains.params, tokens, "blocks.*.resid_post", mask=mask, batch=2)
    assert list(every) == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert every[SITE].shape == (5, LENGTH, 32)
    last = capture(domains.model, domains.params, tokens, SITE, mask=mask, position=-1, batch=2)[SITE]
    np.testing.assert_allclose(every[SITE][mask], found[SITE][mask], atol=1e-5)
    assert (every[SITE][~mask] == 0).all() and np.abs(every[SITE][mask]).min(axis=-1).max() > 0
    expected = found[SITE][np.arange(5), mask.sum(axis=1) - 1]
    np.testing.assert_allclose(last, expected, atol=1e-5)
    with pytest.raises(SiteError, match="prompt 3 has 1 tokens, so none at position 1"):
        capture(domains.model, domains.params, tokens, SITE, mask=mask, position=1)
    with pytest.raises(SiteError, match=r"blocks\.0\.attn\.pattern"):
        capture(domains.model, domains.params, tokens, "blocks.0.attn.pattern", position=-1)


def test_vector_algebra() -> None:
    rng = np.random.default_rng(0)
    v, others = rng.normal(size=8).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    dependent = np.concatenate([others, others[:1] * 2, np.zeros((1, 8), np.float32)])
    rest = np.asarray(project_out(jnp.asarray(v), jnp.asarray(dependent)))
    coefficients: np.ndarray = np.linalg.lstsq(others.T, v, rcond=None)[0]
    np.testing.assert_allclose(rest, v - others.T @ coefficients, atol=1e-5)
    assert np.abs(others @ rest).max() < 1e-5 < np.abs(others @ v).max()
    assert float(jnp.linalg.norm(with_strength(jnp.asarray(v), -0.5, 3.0))) == pytest.approx(1.5, rel=1e-5)
    assert bool((unit(jnp.zeros(4)) == 0).all())


def test_principal_difference_is_that_of_scikit_learn_on_both_signs() -> None:
    from sklearn.decomposition import TruncatedSVD

    rng = np.random.default_rng(1)
    positive, negative = rng.normal(size=(2, 40, 6)).astype(np.float32)
    positive += np.array([2.0, -1, 0, 0, 0.5, 0], np.float32)
    axis = np.asarray(principal_difference(jnp.asarray(positive), jnp.asarray(negative)))
    peer = TruncatedSVD(1, algorithm="arpack").fit(positive - negative).components_[0]
    assert abs(float(axis @ peer)) == pytest.approx(1, abs=1e-4)
    mean = mean_difference(jnp.asarray(positive), jnp.asarray(negative))
    np.testing.assert_allclose(mean, positive.mean(0) - negative.mean(0), atol=1e-6)
    assert float(axis @ np.asarray(mean)) > 0
    with pytest.raises(SiteError, match="do not form pairs"):
        principal_difference(jnp.asarray(positive), jnp.asarray(negative[:-1]))


@pytest.mark.slow
def test_steering_turns_the_text_towards_a_domain(domains: Trained) -> None:
    prompts = jnp.asarray(neutral(64))

    def share(vector: SteeringVector, strength: float) -> float:
        edit = {SITE: vector.edit(strength)}
        text = generate(
            domains.model, domains.params, prompts, max_new_tokens=8, sampler=sample(), key=0, edit=edit
        )
        return share_of(1, np.asarray(text.tokens))

    one, other = lines(1, 64), lines(0, 64)
    found = steering_vector(domains.model, domains.params, SITE, one, other)
    shares = [share(found, strength) for strength in (-0.2, 0.0, 0.2)]
    assert shares[0] < 0.25 < shares[1] < 0.75 < shares[2]
    axis = steering_vector(domains.model, domains.params, SITE, one, other, method="pca")
    assert share(axis, 0.2) - share(axis, -0.2) > 0.6
    # Vectors of equal length that point anywhere: what a fifth of the norm does by itself.
    noise = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    controls = [SteeringVector(jnp.asarray(vector), found.norm) for vector in noise]
    shifts = [abs(share(control, 0.2) - share(control, -0.2)) for control in controls]
    assert np.mean(shifts) < 0.3 and max(shifts) < 0.5


def test_vectors_are_added_where_they_are_wanted() -> None:
    x = jnp.zeros((2, 3, 4), jnp.bfloat16)
    where = jnp.array([[True, False, False], [False, False, True]])
    added = add_vector(jnp.arange(4.0), where=where)(x)
    np.testing.assert_array_equal(added.astype(jnp.float32)[where], np.tile(np.arange(4.0), (2, 1)))
    assert float(jnp.abs(added[~where]).max()) == 0 and added.dtype == jnp.bfloat16


def test_a_decoder_row_steers_like_any_vector(domains: Trained) -> None:
    sae = random_sae(32)
    rows = capture(domains.model, domains.params, lines(0, 4), SITE)[SITE].reshape(-1, 32)
    found = latent_direction(sae, 5, rows)
    moved = found.edit(0.5)(jnp.zeros((1, 1, 32)))[0, 0]
    assert float(jnp.linalg.norm(moved)) == pytest.approx(0.5 * np.linalg.norm(rows, axis=1).mean(), rel=1e-4)
    assert float(unit(moved) @ unit(sae.W_dec[5])) == pytest.approx(1, abs=1e-5)
    with pytest.raises(SAEError, match="latent 48"):
        latent_direction(sae, 48, rows)
