"""Ablation sparsity: the measure on known effects, the ablation as by hand, latents against channels."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.sae.evaluation.sparsity import channel_sparsity, effect_sparsity, latent_sparsity
from tests.sae.evaluation.trained_model import SITE, SubjectModel


def test_the_measure_counts_what_moves() -> None:
    v, t = 101, 4
    one = np.zeros((t, v), np.float32)
    one[0, 3] = 5
    assert effect_sparsity(jnp.asarray(one)) == pytest.approx(1 / (v * t))
    some = np.zeros((t, v), np.float32)
    some[:2, :25] = np.array([2.0, -2.0])[:, None]  # 50 equal effects
    assert effect_sparsity(jnp.asarray(some)) == pytest.approx(50 / (v * t))
    # A shift of all logits of a token changes no probability, and counts for nothing.
    assert effect_sparsity(jnp.asarray(some + np.arange(t)[:, None])) == pytest.approx(50 / (v * t), rel=1e-4)
    assert np.isnan(effect_sparsity(jnp.ones((t, v))))


def test_an_ablation_is_the_subtraction_of_what_the_latent_writes(subject: SubjectModel) -> None:
    few = replace(subject.source, tokens=subject.source.tokens[:1], batch=4)
    # An SAE of which one latent is ever active, at every token: the lot has no choice.
    d = subject.sae
    alone = replace(
        d,
        W_enc=jnp.zeros_like(d.W_enc),
        b_enc=jnp.zeros_like(d.b_enc).at[5].set(3.0),
        config=replace(d.config, k=1),
    )
    found = latent_sparsity(alone, few, samples=4, horizon=8, seed=3)
    assert found.ablations == 4
    rng = np.random.default_rng(3)
    counted = (np.arange(25) > 0) & ~np.isin(few.tokens[0, :25], few.special_ids)
    positions = rng.choice(np.flatnonzero(counted), 4)

    @jax.jit
    def logits(position: int, strength: float) -> jax.Array:
        edit = {SITE: lambda x: x.at[0, position].add(-strength * d.W_dec[5])}
        out = few.model.apply(few.params, jnp.asarray(few.tokens), edit=edit).logits
        assert out is not None
        return out[0]

    wanted = []
    for p in positions.tolist():
        moved = np.asarray(logits(p, 3.0) - logits(p, 0.0), np.float64)[p : p + 8]
        moved -= np.median(moved, axis=-1, keepdims=True)
        wanted.append(np.abs(moved).sum() ** 2 / ((moved**2).sum() * moved.size))
    assert found.sparsity == pytest.approx(np.mean(wanted), rel=1e-3)
    assert found.error == pytest.approx(np.std(wanted) / np.sqrt(4), rel=1e-2)


def test_latents_neurons_and_residual_channels(subject: SubjectModel) -> None:
    latents = latent_sparsity(subject.sae, subject.source, samples=64)
    channels = channel_sparsity(subject.source, samples=64)
    neurons = channel_sparsity(replace(subject.source, sites=("blocks.0.mlp.post",)), samples=64)
    for found in (latents, channels, neurons):
        assert 1 / (16 * 384) < found.sparsity < 1 and 0 < found.error < found.sparsity
        assert found.ablations == 64


def test_what_cannot_be_measured_is_said(subject: SubjectModel) -> None:
    with pytest.raises(SAEError, match="fewer than the horizon"):
        channel_sparsity(subject.source, horizon=33)
    silent = replace(subject.sae, b_enc=jnp.full(96, -1e6))
    with pytest.raises(SAEError, match="no ablation moved"):
        latent_sparsity(silent, subject.source, samples=8)
