"""The one KL divergence is scipy's, and keeps its numbers where distributions are far apart."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from mergelab.activations.losses import UNEMBEDDED, kl_divergence, kl_of_log_probabilities, token_losses
from mergelab.models import Model, model_from_config
from mergelab.models.model import Params


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


def model_of(vocabulary: int) -> Model:
    return model_from_config(
        {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1,
        }
    )  # fmt: skip


EDITS = (None, {"blocks.0.resid_post": jax.tree_util.Partial(jnp.add, jnp.arange(8.0)[None, None])})


def losses_of(model: Model, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the model as it is, and with its stream shifted."""
    hidden = [
        model.apply(params, tokens, edit=edit, capture=[UNEMBEDDED], logits=False).captured[UNEMBEDDED]
        for edit in EDITS
    ]
    return token_losses(model, params, jnp.stack(hidden)[:, :, :-1], tokens[:, 1:])


@pytest.mark.parametrize("bytes_at_once", [1, 4 * 2 * 50 * 4, 2**28])
def test_losses_a_few_logits_at_a_time_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch, bytes_at_once: int
) -> None:
    monkeypatch.setattr("mergelab.activations.losses.LOGIT_BYTES", bytes_at_once)  # 1, 4 and all tokens
    model = model_of(50)
    params = model.init(0)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 6)), jnp.int32)
    logits = [np.asarray(model.apply(params, tokens, edit=edit).logits, np.float64) for edit in EDITS]
    p, q = (log_softmax(x[:, :-1], axis=-1) for x in logits)
    ce, kl = losses_of(model, params, tokens)
    for found, logp in zip(ce, (p, q), strict=True):
        expected = -np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(kl, rel_entr(np.exp(p), np.exp(q)).sum(axis=-1), rtol=1e-3)
    assert np.min(kl) > 1e-4


def test_memory_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    """At a vocabulary of 256,000, whole logits of two passes over 32 contexts of 128 tokens would be 8 GB."""
    model = model_of(256_000)
    params = jax.eval_shape(lambda: model.init(0))
    tokens = jax.ShapeDtypeStruct((32, 128), jnp.int32)
    compiled = jax.jit(partial(losses_of, model)).lower(params, tokens).compile()
    assert 2**28 < compiled.memory_analysis().temp_size_in_bytes < 2**30
