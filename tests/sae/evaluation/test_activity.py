"""Histograms, co-activation and logit effects are what plain loops and matrices give."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.kept import EVERY_TOKEN
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.families import model_from_config
from mergelab.sae.features.logit_effects import logit_effects
from mergelab.sae.features.survey import activity, read_codes, survey
from mergelab.sae.sae import SAE, SAEConfig
from tests.sae.evaluation.trained_model import SubjectModel


def test_histograms_and_neighbors(subject: SubjectModel) -> None:
    source = replace(subject.source, batch=16, rule=EVERY_TOKEN)  # the last pass is filled up
    found = survey(subject.sae, source, count=1)
    latents = np.flatnonzero(found.density > 0)[5:40]
    got = activity(read_codes(subject.sae, source), latents, found.peak, 32, bins=5, most=3)
    rows = jnp.asarray(source.read_sites(0, source.rows)[0])
    codes = np.asarray(subject.sae.encode(rows))[:, latents]
    for i, latent in enumerate(latents):
        active = codes[:, i][codes[:, i] > 0]
        wanted, _ = np.histogram(active, 5, (0, found.peak[latent] * (1 + 1e-6)))
        assert np.abs(got.histogram[i] - wanted).sum() <= 2  # a value on an edge may fall to either side
        assert got.histogram[i].sum() == len(active) and got.mean[i] == pytest.approx(active.mean(), rel=1e-4)
        alike = np.array([_alike(codes[:, i], codes[:, j]) if i != j else -1 for j in range(len(latents))])
        np.testing.assert_allclose(got.likeness[i], np.sort(alike)[::-1][:3], atol=1e-6)
        np.testing.assert_allclose(
            alike[np.searchsorted(latents, got.neighbors[i])], got.likeness[i], atol=1e-6
        )


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a > 0) & (b > 0)).sum() / np.sqrt((a > 0).sum() * (b > 0).sum()))


def test_effects_on_logits_of_an_rms_norm(subject: SubjectModel) -> None:
    latents = np.array([3, 70, 9])
    source = replace(subject.source, rule=EVERY_TOKEN)
    found = logit_effects(subject.sae, source, latents, count=4, bins=7)
    model, params = subject.source.model, subject.source.params
    out = model.apply(params, jnp.asarray(subject.source.tokens[:32]), capture=["final_norm.scale"])
    scale = float(out.captured["final_norm.scale"].mean())
    gain = np.asarray(params["final_norm"]["scale"])
    effects = (
        np.asarray(subject.sae.W_dec)[latents] * gain * scale @ np.asarray(params["embed"]["embedding"]).T
    )
    for i in range(3):
        order = np.argsort(-effects[i])
        np.testing.assert_array_equal(found.top[i], order[:4])
        np.testing.assert_allclose(found.top_values[i], effects[i][order[:4]], rtol=1e-3)
        np.testing.assert_array_equal(found.bottom[i], order[::-1][:4])
        np.testing.assert_allclose(found.bottom_values[i], effects[i][order[::-1][:4]], rtol=1e-3)
        assert found.histogram[i].sum() == 384 and found.edges.shape == (3, 8)


@pytest.mark.slow
def test_a_layer_norm_is_centered_and_its_bias_is_no_effect() -> None:
    config = {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
    }
    model = model_from_config(config)
    params = model.init(0)
    params["final_norm"]["bias"] = jnp.arange(16.0)
    tokens = np.arange(32, dtype=np.int32).reshape(4, 8)
    source = ModelActivations(model, params, tokens, ("blocks.0.resid_post",), batch=4, rule=EVERY_TOKEN)
    rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    arrays = (jnp.zeros((16, 5)), jnp.zeros(5), jnp.asarray(rows), jnp.zeros(16))
    sae = SAE(*arrays, config=SAEConfig("relu"))
    found = logit_effects(sae, source, [0, 4], count=3)
    captured = model.apply(params, jnp.asarray(tokens), capture=["final_norm.scale"]).captured
    scale = float(captured["final_norm.scale"].mean())
    centered = rows[[0, 4]] - rows[[0, 4]].mean(axis=1, keepdims=True)
    effects = centered * scale @ np.asarray(params["embed"]["embedding"]).T
    np.testing.assert_allclose(found.top_values, np.sort(effects)[:, ::-1][:, :3], rtol=1e-3)
    narrow = replace(sae, W_dec=jnp.zeros((5, 12)), b_dec=jnp.zeros(12))
    with pytest.raises(SAEError, match="stream is 16"):
        logit_effects(narrow, source, [0])
