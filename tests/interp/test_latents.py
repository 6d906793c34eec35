"""Changing a latent adds `(g - f) d` to the activation, and nothing else about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.interp.latent_edits import ablate, add, clamp, scale, splice
from tests.interp.domains import Trained, lines
from tests.interp.running import logits_of
from tests.interp.saes import random_sae

SITE = "blocks.0.resid_post"
KINDS: list[dict[str, Any]] = [
    {"activation": "topk"},
    {"activation": "jump_relu"},
    {"activation": "topk", "normalization": "layer_norm"},
]


def activations(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, 5, 16)), jnp.float32)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_edit_is_the_edited_reconstruction_plus_the_error_term(kind: dict[str, Any]) -> None:
    sae, x = random_sae(16, **kind), activations()
    rows = x.reshape(-1, 16)
    codes = sae.encode(rows)
    latent = int(jnp.argmax((codes > 0).sum(axis=0)))
    error = rows - sae(rows)
    expected = {
        ablate(sae, latent): codes.at[:, latent].set(0),
        clamp(sae, [latent, 3], [2.0, 0.5]): codes.at[:, jnp.array([latent, 3])].set(jnp.array([2.0, 0.5])),
        scale(sae, latent, -3.0): codes.at[:, latent].multiply(-3),
        add(sae, latent, 1.5): codes.at[:, latent].add(1.5),
    }
    for edit, edited in expected.items():
        wanted = sae.reconstruct(rows, edited) + error
        np.testing.assert_allclose(edit(x).reshape(-1, 16), wanted, atol=2e-5)
        assert np.abs(np.asarray(edit(x) - x)).max() > 0.1


def test_ablation_subtracts_what_the_latent_writes() -> None:
    sae, x = random_sae(16), activations()
    codes = sae.encode(x.reshape(-1, 16))
    latent = int(jnp.argmax((codes > 0).sum(axis=0)))
    written = jnp.outer(codes[:, latent], sae.W_dec[latent]).reshape(x.shape)
    np.testing.assert_allclose(ablate(sae, latent)(x), x - written, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_edit_that_changes_no_code_changes_no_bit(kind: dict[str, Any]) -> None:
    sae, x = random_sae(16, **kind), activations()
    for dtype in (jnp.float32, jnp.bfloat16):
        typed = x.astype(dtype)
        for edit in (add(sae, [0, 7], 0.0), scale(sae, 5, 1.0), splice(sae, error=True)):
            assert edit(typed).dtype == dtype
            assert bool((edit(typed) == typed).all())


def test_only_the_tokens_asked_for_change() -> None:
    sae, x = random_sae(16), activations()
    where = jnp.zeros((3, 5), bool).at[1, 2].set(True)
    changed = np.abs(np.asarray(add(sae, 4, 1.0, where=where)(x) - x)).max(axis=-1) > 0
    np.testing.assert_array_equal(changed, where)


def test_splice_replaces_and_its_gradient_passes_through_the_sae() -> None:
    sae, x = random_sae(16), activations()
    rows = x.reshape(-1, 16)
    np.testing.assert_allclose(splice(sae)(x).reshape(-1, 16), sae(rows), atol=1e-6)
    where = np.arange(5)[None].repeat(3, axis=0) > 0  # the first tokens stay as they are
    changed = splice(sae, where=where)(x)
    wanted = np.where(where[..., None], np.asarray(sae(rows)).reshape(x.shape), x)
    np.testing.assert_allclose(changed, wanted, atol=1e-6)
    gradients = [
        jax.grad(lambda v, e=edit: (splice(sae, error=e)(v) ** 2).sum())(x) for edit in (False, True)
    ]
    through = jax.vjp(sae, rows)[1](2 * rows)[0].reshape(x.shape)
    np.testing.assert_allclose(gradients[1], through, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(gradients[0] - gradients[1])).max() > 0.1


def test_edits_run_in_a_model_and_compile_once(domains: Trained) -> None:
    sae = random_sae(32)
    tokens = jnp.asarray(lines(0, 2))
    traced = 0

    @jax.jit
    def logits(edit: Any) -> Any:
        nonlocal traced
        traced += 1
        return domains.model.apply(domains.params, tokens, edit={SITE: edit}).logits

    plain = logits_of(domains.model, domains.params, tokens)
    np.testing.assert_allclose(logits(add(sae, 1, 0.0)), plain, atol=1e-5)
    assert np.abs(np.asarray(logits(add(sae, 2, 3.0)) - plain)).max() > 1e-2
    assert traced == 1


def test_what_cannot_be_meant_is_refused() -> None:
    sae = random_sae(16)
    with pytest.raises(SAEError, match="latent 48 does not exist"):
        ablate(sae, [0, 48])
    with pytest.raises(SAEError, match="twice"):
        ablate(sae, [3, 3])
    with pytest.raises(SAEError, match="3 amounts were given for 2 latents"):
        clamp(sae, [0, 1], [1.0, 2.0, 3.0])
    transcoder = replace(sae, W_skip=jnp.zeros((16, 16)))
    with pytest.raises(SAEError, match="autoencoder of that site"):
        splice(transcoder)
