"""The optimizer's step, beside optax's Adam with a learning rate for each kind of parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mergelab.sae.kernels.collectives import ONE_DEVICE
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.update import learning_rate, update
from mergelab.sae.variants import make_variant

D, N, STEPS = 6, 12, 40
PLAIN = {"unit_decoder": False, "project_gradients": False, "bias_boost": 0.0, "ema": 0.0}


@pytest.mark.parametrize(
    ("recipe", "b2"),
    [
        (TrainingRecipe(STEPS, 4, learning_rate=1e-2, **PLAIN), 0.9),
        pytest.param(
            TrainingRecipe(STEPS, 4, learning_rate=1e-2, b2=0.99, encoder_rate=1.0, bias_rate=1.0, **PLAIN),
            0.99,
            marks=pytest.mark.slow,
        ),
        (TrainingRecipe(STEPS, 4, learning_rate=1e-2, b1=0.5, encoder_rate=0.2, bias_rate=5.0, **PLAIN), 0.9),
    ],
    ids=["defaults", "paper", "other"],
)
def test_it_is_adam_with_a_rate_for_each_kind_of_parameter(recipe: TrainingRecipe, b2: float) -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=2)
    rng = np.random.default_rng(0)
    state = initialize(variant, recipe, jax.random.key(0), rng.standard_normal((50, D)).astype(np.float32))
    rates = {"encoder": recipe.encoder_rate, "encoder_bias": recipe.bias_rate}
    labels = {name: name if name in rates else "rest" for name in state.params}

    def rule(factor: float) -> optax.GradientTransformation:
        return optax.adam(
            lambda count: factor * learning_rate(recipe, 1e-2, count), b1=recipe.b1, b2=b2, eps=recipe.eps
        )

    theirs = optax.multi_transform({name: rule(rates.get(name, 1.0)) for name in [*rates, "rest"]}, labels)
    params, moments = state.params, theirs.init(state.params)
    for _ in range(STEPS):
        grads = {
            name: jnp.asarray(rng.standard_normal(value.shape), jnp.float32) for name, value in params.items()
        }
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, moments = theirs.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
        state, _ = update(variant, recipe, state, grads, ONE_DEVICE)
    for name, value in params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("steps", "horizon"), [(10, 10), (250, 10), (2500, 100), (25_000, 1000), (10**6, 1000)]
)
def test_squares_are_averaged_over_a_part_of_the_training(steps: int, horizon: int) -> None:
    assert TrainingRecipe(steps, 4).square_decay == pytest.approx(1 - 1 / horizon)
    assert TrainingRecipe(steps, 4, b2=0.95).square_decay == 0.95
