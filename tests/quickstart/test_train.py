"""Training learns, repeats itself exactly, and leaves its starting point alone (on a bigram model)."""

from __future__ import annotations

from itertools import repeat

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from mergelab.quickstart.train import TrainSettings, next_token_loss, train_lm
from mergelab.text.packing import random_windows

VOCABULARY = 9
SETTINGS = TrainSettings(steps=12, learning_rate=0.5, warmup_steps=2)
STREAM = np.tile(np.arange(1, VOCABULARY, dtype=np.int32), 50)


def bigram(params: dict[str, Array], tokens: Array) -> Array:
    return params["table"][tokens]


def start() -> dict[str, Array]:
    return {"table": jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY)) / 10}


def train(seed: int) -> tuple[dict[str, Array], np.ndarray]:
    return train_lm(bigram, start(), random_windows(STREAM, 16, 4, seed), SETTINGS)


def test_a_cycle_is_learnt_and_the_run_repeats_to_the_bit() -> None:
    params, losses = train(seed=3)
    assert losses.shape == (SETTINGS.steps,)
    assert losses[0] == pytest.approx(np.log(VOCABULARY), rel=0.1)
    assert losses[-1] < 0.2 * losses[0]
    again, same = train(seed=3)
    np.testing.assert_array_equal(losses, same)
    np.testing.assert_array_equal(params["table"], again["table"])
    assert not np.array_equal(losses, train(seed=4)[1])


def test_the_start_is_left_untouched_and_every_step_reported() -> None:
    params = start()
    steps: list[int] = []
    window = np.arange(1, 8, dtype=np.int32)[None]
    trained, _ = train_lm(
        bigram, params, repeat(window), SETTINGS, on_step=lambda step, params: steps.append(step)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, start())
    assert steps == list(range(1, SETTINGS.steps + 1))
    np.testing.assert_array_equal(params["table"], start()["table"])


def test_the_loss_is_the_mean_surprise_of_the_next_token() -> None:
    windows = jnp.array([[5, 6, 7, 8], [1, 1, 2, 3]])
    log_p = np.asarray(jax.nn.log_softmax(start()["table"]))
    expected = -np.mean([log_p[a, b] for a, b in ((5, 6), (6, 7), (7, 8), (1, 1), (1, 2), (2, 3))])
    assert float(next_token_loss(bigram, start(), windows)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_weight_decay_spares_the_norms() -> None:
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    optimizer = (
        TrainSettings(steps=10, learning_rate=0.1, warmup_steps=0, weight_decay=0.5).optimizer().build()
    )
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    assert float(updates["kernel"][0, 0]) == pytest.approx(-0.1 * 0.5)
    assert float(updates["scale"][0]) == 0.0
