"""The strongest contexts of every latent are those a plain sort of all codes finds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.kept import EVERY_TOKEN
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.families import model_from_config
from mergelab.quickstart import small_llama
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE, SAEConfig

SITE = "blocks.0.resid_post"


@pytest.fixture(scope="module")
def source() -> ModelActivations:
    config = small_llama.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = model_from_config(config.to_hf())
    tokens = np.random.default_rng(0).integers(0, 50, (21, 8)).astype(np.int32)
    return ModelActivations(model, model.init(0), tokens, (SITE,), batch=4, rule=EVERY_TOKEN)


def _sae(d_in: int) -> SAE:
    rng = np.random.default_rng(1)
    arrays = [
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((d_in, 40), (40,), (40, d_in), (d_in,))
    ]
    return SAE(*arrays, config=SAEConfig(k=3)).checked()


def test_examples_are_the_strongest(source: ModelActivations) -> None:
    sae = _sae(16)
    found = survey(sae, source, count=3)
    rows = jnp.asarray(source.read_sites(0, source.rows)[0])
    codes = np.asarray(jax.jit(sae.encode)(rows)).reshape(21, 8, 40)
    np.testing.assert_allclose(found.density, (codes > 0).mean(axis=(0, 1)))
    np.testing.assert_allclose(found.peak, codes.max(axis=(0, 1)), rtol=1e-5)
    for latent in range(40):
        peaks = codes[:, :, latent].max(axis=1)
        wanted = np.sort(peaks[peaks > 0])[::-1][:3]
        examples = found.examples[latent]
        np.testing.assert_allclose([example.peak for example in examples], wanted, rtol=1e-5)
        for example in examples:
            np.testing.assert_allclose(example.codes, codes[example.context, :, latent], rtol=1e-5, atol=1e-6)
            assert example.tokens == tuple(source.tokens[example.context])
    assert max(len(examples) for examples in found.examples.values()) == 3


def test_a_part_of_text_and_latents(source: ModelActivations) -> None:
    found = survey(_sae(16), source, latents=[3, 5], contexts=6)
    assert set(found.examples) == {3, 5} and found.rows == 48
    assert all(example.context < 6 for examples in found.examples.values() for example in examples)
    by_density = survey(_sae(16), source, contexts=6, latents=lambda d: np.argsort(-d)[:2].tolist())
    assert len(by_density.examples) == 2 and (by_density.density == found.density).all()
    for latent, examples in survey(_sae(16), source, contexts=6).examples.items():
        assert by_density.examples.get(latent, examples) == examples
    with pytest.raises(SAEError, match="24 wide"):
        survey(_sae(24), source)
