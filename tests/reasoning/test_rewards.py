"""Rewards and preferences equal their formulas in float64, and their gradients go where they should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import TuningError
from mergelab.reasoning.preferences import (
    bradley_terry_loss,
    dpo_loss,
    elo_expected,
    elo_loss,
    elo_update,
    implicit_reward,
    model_implicit_reward,
    sequence_log_probs,
)
from mergelab.reasoning.rewards import (
    clipped_fraction,
    clipped_objective,
    group_advantages,
    kl_estimate,
    length_penalized_reward,
    relative_length_reward,
)
from tests.interp.running import logits_of
from tests.models.tiny_models import TOKENS, tiny

RNG = np.random.default_rng(0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_length_is_charged_to_right_answers_only() -> None:
    correct, lengths = [1, 1, 1, 0, 0.5], [0, 50, 400, 10, 50]
    found = length_penalized_reward(correct, lengths, budget=100, strength=0.4)
    np.testing.assert_allclose(found, [1.0, 0.8, 0.6, 0.0, 0.4], rtol=1e-6)
    with pytest.raises(TuningError, match="budget is 0"):
        length_penalized_reward(correct, lengths, budget=0)
    right, used = np.array([[1, 0, 1, 1.0]]), np.array([[10, 99, 20, 60.0]])
    mean, std = 30.0, np.sqrt((400 + 100 + 900) / 3)
    expected = right * (1 - 0.4 * sigmoid((used - mean) / std))
    np.testing.assert_allclose(relative_length_reward(right, used), expected, rtol=1e-5)
    assert not np.asarray(relative_length_reward(0 * right, used)).any()


def test_advantages_are_standard_scores_within_a_group() -> None:
    rewards = np.array([[1, 0, 0, 1, 1.0], [2, 2, 2, 2, 2]])
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-5)
    np.testing.assert_allclose(
        group_advantages(rewards, scaled=False), rewards - rewards.mean(1, keepdims=True), rtol=1e-6
    )
    slope = jax.jit(jax.grad(lambda r: (group_advantages(r) ** 2).sum()))(jnp.asarray(rewards, jnp.float32))
    assert np.isfinite(slope).all()
    with pytest.raises(TuningError, match="2 or more"):
        group_advantages([[1.0], [0.0]])


def test_the_objective_stops_pushing_beyond_its_bounds() -> None:
    ratio = np.array([0.5, 0.9, 1.0, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5])
    gain = np.array([1.0, 1, 1, 1, 1, -1, -1, -1, -1])
    old = RNG.normal(-2, 1, 9)
    new = (old + np.log(ratio)).astype(np.float32)
    bounded = np.clip(ratio, 0.8, 1.3)
    expected = np.minimum(ratio * gain, bounded * gain)
    run = jax.jit(jax.value_and_grad(lambda x: clipped_objective(x, old, gain, clip_high=0.3).sum()))
    value, slope = run(new)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    stopped = [False, False, False, False, True, True, False, False, False]
    # d/d log p of `w A` is `w A`: what is left where the clip does not act.
    np.testing.assert_allclose(slope, np.where(stopped, 0, ratio * gain), rtol=1e-5, atol=1e-6)
    assert clipped_fraction(new, old, gain, clip_high=0.3) == pytest.approx(2 / 9)
    with pytest.raises(TuningError, match="clip"):
        clipped_objective(new, old, gain, clip=-0.1)


def test_the_estimate_of_kl_is_unbiased_and_never_negative() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    each = np.asarray(kl_estimate(np.log(p), np.log(q)))
    assert (each > 0).all()
    assert (p * each).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert kl_estimate(-1.0, -1.0) == 0


def test_dpo_is_the_logistic_loss_of_the_implicit_rewards() -> None:
    chosen, rejected, ref_chosen, ref_rejected = RNG.normal(-20, 3, (4, 6))
    lead = 0.5 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    run = jax.jit(
        jax.value_and_grad(lambda x, y: dpo_loss(x, y, ref_chosen, ref_rejected, beta=0.5).sum(), (0, 1))
    )
    value, (up, down) = run(chosen.astype(np.float32), rejected.astype(np.float32))
    np.testing.assert_allclose(value, np.log1p(np.exp(-lead)).sum(), rtol=1e-5)
    np.testing.assert_allclose(up, -0.5 * sigmoid(-lead), rtol=1e-4)
    np.testing.assert_allclose(down, 0.5 * sigmoid(-lead), rtol=1e-4)
    margin = implicit_reward(chosen, ref_chosen, beta=0.5) - implicit_reward(rejected, ref_rejected, beta=0.5)
    np.testing.assert_allclose(margin, lead, rtol=1e-4, atol=1e-5)
    with pytest.raises(TuningError, match=r"label_smoothing is 0\.5"):
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.5)


def test_bradley_and_terry_and_elo_are_one_model() -> None:
    first, second = np.array([1500, 1700, 1400.0]), np.array([1500, 1300, 1800.0])
    expected = 1 / (1 + 10 ** ((second - first) / 400))
    np.testing.assert_allclose(elo_expected(first, second), expected, rtol=1e-5)
    scale = np.log(10) / 400
    np.testing.assert_allclose(
        elo_loss(first, second, 1.0), bradley_terry_loss(scale * first, scale * second), rtol=1e-5
    )
    made = np.array([1, 0.5, 0.0])
    entropy = -(made * np.log(expected) + (1 - made) * np.log(1 - expected))
    np.testing.assert_allclose(elo_loss(first, second, made), entropy, rtol=1e-5)
    # A game's update is a step of gradient descent.
    slope = jax.jit(jax.grad(lambda x: elo_loss(x, second, made).sum()))(first.astype(np.float32))
    risen, fallen = elo_update(first, second, made, k=16)
    np.testing.assert_allclose(risen, first - 16 / scale * slope, rtol=1e-6)
    np.testing.assert_allclose(risen + fallen, first + second, rtol=1e-6)
    assert bradley_terry_loss(2.0, 1.0, margin=1.0) == pytest.approx(np.log(2))


def test_the_implicit_reward_of_two_models_is_the_ratio_of_their_probabilities() -> None:
    (model, params), other = tiny("llama"), jax.tree.map(lambda x: 1.1 * x, tiny("llama")[1])
    counted = np.zeros(TOKENS.shape, bool)
    counted[0, 4:], counted[1, 6:9], counted[2, 0] = True, True, True
    found = []
    for weights in (params, other):
        logits = logits_of(model, weights, TOKENS).astype(np.float64)[:, :-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)[..., 0]
        found.append((chosen * counted[:, 1:]).sum(1))
    reward = model_implicit_reward(model, params, (model, other), TOKENS, counted, beta=0.2, batch=2)
    np.testing.assert_allclose(reward, 0.2 * (found[0] - found[1]), rtol=1e-4, atol=1e-4)
    assert reward[2] == 0 and np.abs(reward[:2]).min() > 1e-2
    np.testing.assert_allclose(
        sequence_log_probs(model, params, TOKENS, counted), found[0], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(TuningError, match="no answers"):
        model_implicit_reward(model, params, (model, other), TOKENS, counted[:, 1:])
