"""Sites with heads (`blocks.0.attn.z`): heads side by side in training data, splices and what is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations import ActivationStream
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.interp.latent_edits import ablate
from mergelab.interp.latent_edits import splice as splice_at
from mergelab.models import model_from_config
from mergelab.sae.evaluation.sparsity import channel_sparsity, latent_sparsity
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sae.splice import splice
from mergelab.sae.spliced_losses import evaluate_downstream

SITE, HEADS, D = "blocks.0.attn.z", 4, 16
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": D, "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def source() -> ModelActivations:
    model = model_from_config(CONFIG)
    return ModelActivations(model, model.init(0), TOKENS, (SITE,), batch=2)


def _sae(*, exact: bool = False) -> SAE:
    """A random dictionary, or one that reconstructs everything: each direction and its opposite."""
    rng = np.random.default_rng(1)
    W = np.concatenate([np.eye(D), -np.eye(D)], axis=1) if exact else rng.standard_normal((D, 2 * D))
    zeros = jnp.zeros(2 * D), jnp.asarray(W.T, jnp.float32), jnp.zeros(D)
    config = SAEConfig("relu", reads=(SITE,), transcoder=False)
    return SAE(jnp.asarray(W, jnp.float32), *zeros, config).checked()


@pytest.fixture(scope="module")
def z(source: ModelActivations) -> jax.Array:
    """What the site holds."""
    return jax.jit(lambda p, t: source.model.apply(p, t, capture=[SITE], logits=False).captured[SITE])(
        source.params, jnp.asarray(TOKENS)
    )


def test_a_row_has_all_heads_of_a_token(source: ModelActivations, z: jax.Array) -> None:
    assert z.shape == (3, 20, HEADS, D // HEADS)
    assert source.widths == (D,)
    np.testing.assert_allclose(source.read_sites(0, 60)[0], np.asarray(z).reshape(60, D), atol=1e-6)
    batch = next(iter(ActivationStream(source.at(SITE), batch_size=8, seed=0)))
    assert batch.input.shape == (8, D)


def test_patterns_are_refused(source: ModelActivations) -> None:
    with pytest.raises(SAEError, match=r"blocks.0.attn.pattern.*reads \[batch, length, width\]"):
        replace(source, sites=("blocks.0.attn.pattern",))


def test_a_splice_puts_the_heads_back(z: jax.Array) -> None:
    sae = _sae()
    wanted = sae(z.reshape(60, D)).reshape(z.shape)
    np.testing.assert_array_equal(splice(sae)(z), wanted)
    np.testing.assert_allclose(splice(sae, error=True)(z), z, atol=1e-6)
    assert ablate(sae, 3)(z).shape == z.shape
    some = np.arange(20) > 4
    edited = np.asarray(splice_at(sae, where=np.broadcast_to(some, (3, 20)))(z))
    np.testing.assert_allclose(edited, np.where(some[None, :, None, None], wanted, z), atol=1e-6)


def test_an_exact_dictionary_loses_nothing(source: ModelActivations) -> None:
    found = evaluate_downstream(_sae(exact=True), source)
    assert found.delta_ce == pytest.approx(0, abs=1e-6) and found.kl == pytest.approx(0, abs=1e-6)
    assert abs(found.ce_mean - found.ce) > 1e-5 and found.ce_mean != found.ce_zero
    assert evaluate_downstream(_sae(), source).kl > 1e-4


@pytest.mark.slow
def test_latents_and_channels_of_heads_are_ablated(source: ModelActivations) -> None:
    for found in (latent_sparsity(_sae(), source, samples=6), channel_sparsity(source, samples=6)):
        assert 0 < found.sparsity < 1


def test_activations_with_heads_are_encoded_too(source: ModelActivations) -> None:
    sae = _sae()
    z = np.random.default_rng(2).standard_normal((2, 3, HEADS, D // HEADS)).astype(np.float32)
    flat = z.reshape(2, 3, D)
    np.testing.assert_array_equal(sae.encode(z), sae.encode(flat))
    np.testing.assert_array_equal(sae(z), np.asarray(sae(flat)).reshape(z.shape))
    elsewhere = replace(sae, config=replace(sae.config, reads=("blocks.0.resid_post",), writes=None))
    with pytest.raises(SAEError, match="d_in=16"):
        elsewhere.encode(z)


def test_saelens_is_told_to_put_heads_side_by_side(tmp_path: Path) -> None:
    save_sae(_sae(), tmp_path / "sae", "saelens")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z"
    assert cfg["metadata"]["hook_name"] == "blocks.0.attn.hook_z"
    assert load_sae(tmp_path / "sae").config.reads == (SITE,)
