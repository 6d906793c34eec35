"""Baselines on a small toy ground truth: neither recovers features, a trained SAE does."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.sae.evaluation.controls import freeze_decoder, random_state
from mergelab.sae.features.matching import recovery
from mergelab.sae.toy import ToyGroundTruth
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.state import TrainState
from mergelab.sae.training.step import Step, make_step
from mergelab.sae.training.update import averaged_params
from mergelab.sae.variants import TopK

TRUTH = ToyGroundTruth(d_in=16, n_features=32, l0=2.0, exponent=0.0, rows=300 * 256)
VARIANT = TopK(d_in=16, n_latents=64, k=2)
RECIPE = TrainingRecipe(steps=300, batch_size=256, learning_rate=4e-3, ema=0.9)


@pytest.fixture(scope="module")
def step() -> Step:
    return make_step(VARIANT, RECIPE)


def _train(change: Callable[[TrainState], Step], steps: int) -> tuple[TrainState, np.ndarray, float]:
    state = initialize(VARIANT, RECIPE, jax.random.key(0), TRUTH.sample(2000))
    started = np.array(state.params["decoder"])
    run, nmse = change(state), 1.0
    for start in range(0, steps * 256, 256):
        batch = jnp.asarray(TRUTH.read(start, start + 256))
        state, metrics = run(state, batch, batch)
        nmse = float(metrics["nmse"])
    return state, started, nmse


@pytest.mark.slow
def test_a_frozen_decoder_keeps_its_directions_and_learns_to_encode(step: Step) -> None:
    state, started, nmse = _train(lambda initial: freeze_decoder(step, initial, RECIPE.ema_decay), 300)
    np.testing.assert_array_equal(state.params["decoder"], started)
    np.testing.assert_allclose(averaged_params(state, RECIPE.ema_decay)["decoder"], started, atol=1e-6)
    assert np.abs(np.asarray(state.params["encoder"]) - started).max() > 0.1
    trained, start, nmse_trained = _train(lambda _: step, 300)
    np.testing.assert_array_equal(start, started)
    assert np.abs(np.asarray(trained.params["decoder"]) - started).max() > 0.1
    assert nmse_trained < 0.5 * nmse < 0.4
    above = recovery(TRUTH.features, np.asarray(trained.params["decoder"])).above
    assert above > 0.9 > 0.2 > recovery(TRUTH.features, started).above


def test_a_random_sae_is_the_state_before_training() -> None:
    sample = TRUTH.sample(2000)
    state = random_state(VARIANT, jax.random.key(0), sample)
    trained = initialize(VARIANT, RECIPE, jax.random.key(0), sample)
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, trained.params[name])
    other = random_state(VARIANT, jax.random.key(1), sample)
    assert not np.array_equal(other.params["decoder"], state.params["decoder"])
    assert recovery(TRUTH.features, np.asarray(state.params["decoder"])).above < 0.2
