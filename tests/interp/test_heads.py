"""Scores of heads: on planted attention patterns, on planted weights, and against plain linear algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SiteError
from mergelab.interp.attention_heads import (
    composition_scores,
    copying_scores,
    head_scores,
    head_weights,
    repeated_tokens,
)
from mergelab.interp.function_vectors import function_vector, mean_heads
from mergelab.interp.steering import add_vector
from mergelab.interp.value_vectors import tokens_of_values, value_search
from tests.interp.domains import OWN, Trained, lines, neutral
from tests.interp.planted import planted
from tests.interp.running import logits_of, sites_of
from tests.models.tiny_models import tiny

HALF = 6


def test_scores_find_planted_patterns() -> None:
    model, params = planted()

    def looking_back(pattern: jax.Array, places: int, head: int) -> jax.Array:
        """That head attends to the token so many places back alone."""
        length = pattern.shape[-1]
        wanted = jnp.maximum(jnp.arange(length) - places, 0)
        return pattern.at[:, head].set(jax.nn.one_hot(wanted, length)[None])

    edits = {
        "blocks.0.attn.pattern": lambda p: looking_back(looking_back(p, 1, 2), HALF, 3),
        "blocks.1.attn.pattern": lambda p: looking_back(p, HALF - 1, 1),
    }
    found = head_scores(model, params, half=HALF, prompts=5, first=0, lowest=1, batch=2, edit=edits)
    tokens = jnp.asarray(repeated_tokens(12, HALF, 5, first=0, lowest=1))
    logits = logits_of(model, params, tokens, edit=edits)[:, -HALF:-1]
    logp = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(logp, tokens[:, -HALF + 1 :, None], axis=-1).mean()
    assert found.repeated_loss == pytest.approx(float(loss), rel=1e-4)
    planted_heads = {"induction": (1, 1), "previous": (0, 2), "duplicate": (0, 3)}
    for name, head in planted_heads.items():
        scores = np.array(getattr(found, name))
        assert scores[head] == pytest.approx(1, abs=1e-6)
        others = [scores[other] for other in planted_heads.values() if other != head]
        assert max(others) == 0
        # Uniform attention gives 1 / number of visible tokens, on average over the second half.
        uniform = np.mean(1 / np.arange(HALF + 2, 2 * HALF + 2))
        assert scores[1, 3] == pytest.approx(uniform, rel=1e-4)


def test_repeated_tokens_repeat_and_are_otherwise_unpredictable(domains: Trained) -> None:
    tokens = repeated_tokens(50, 8, 4, seed=3, first=0, lowest=5)
    assert tokens.shape == (4, 17) and (tokens[:, 0] == 0).all() and tokens[:, 1:].min() >= 5
    np.testing.assert_array_equal(tokens[:, 1:9], tokens[:, 9:])
    assert all(len(set(row)) == 8 for row in tokens[:, 1:9].tolist())
    with pytest.raises(SiteError, match="do not fit"):
        head_scores(domains.model, domains.params, half=40)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_circuits_are_the_dense_matrices(name: str) -> None:
    model, params = tiny(name)
    weights, c = head_weights(model, params), model.config
    ov = np.array([[weights.ov(i, h) for h in range(c.n_heads)] for i in range(c.n_layers)], np.float64)
    qk = np.array([[weights.qk(i, h) for h in range(c.n_heads)] for i in range(c.n_layers)], np.float64)

    def dense(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))

    into = {"q": qk, "k": qk.swapaxes(-1, -2), "v": ov}
    for kind, second in into.items():
        scores = composition_scores(weights, kind)  # pyright: ignore[reportArgumentType]
        expected = [[dense(ov[0, a], second[1, b]) for b in range(c.n_heads)] for a in range(c.n_heads)]
        np.testing.assert_allclose(scores[0, :, 1], expected, rtol=1e-4)
        assert np.isnan(scores[1, :, 0]).all() and np.isnan(scores[0, :, 0]).all()

    gain = np.asarray(params["final_norm"]["scale"], np.float64)
    kernel = np.asarray(params["embed"]["embedding"].T if c.tied else params["unembed"]["kernel"], np.float64)
    kernel = kernel * gain[:, None]
    if c.norm.kind == "layer":
        kernel = kernel - kernel.mean(axis=0)
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    values = np.linalg.eigvals(embedding @ ov @ kernel)
    expected = values.sum(-1).real / np.abs(values).sum(-1)
    np.testing.assert_allclose(copying_scores(model, params), expected, atol=1e-4)


def test_composition_and_copying_find_what_was_planted() -> None:
    model, params = planted()
    scores = composition_scores(head_weights(model, params), "v")[0, :, 1]
    assert np.unravel_index(scores.argmax(), scores.shape) == (1, 2)
    assert np.delete(scores.ravel(), scores.argmax()).max() < 1e-6
    # A head whose values pass unchanged, between tied embeddings, copies; its negative does the contrary.
    model, params = tiny("qwen3")
    attention = params["blocks_0"]["attn"]
    eye = jnp.eye(24, 8)
    attention["v"]["kernel"] = attention["v"]["kernel"].at[:, :8].set(eye)
    attention["o"]["kernel"] = attention["o"]["kernel"].at[:8].set(eye.T).at[8:16].set(-eye.T)
    params["final_norm"]["scale"] = jnp.ones(24)
    params["blocks_0"]["attn_norm"]["scale"] = jnp.ones(24)
    found = copying_scores(model, params)
    np.testing.assert_allclose(found[0, :2], [1, -1], atol=1e-5)
    assert np.abs(found[1]).max() < 0.95


@pytest.mark.slow
def test_a_function_vector_carries_the_task(domains: Trained) -> None:
    model, params = domains.model, domains.params
    rng = np.random.default_rng(4)
    shown = np.concatenate([lines(1, 24, 7, seed=5), rng.choice(np.arange(22, 28), (24, 1))], axis=1)
    bare = neutral(24, 5)
    answers = rng.choice(OWN[1], 24)
    found = function_vector(model, params, shown, bare, answers, top=3, batch=24)
    assert len(found.heads) == 3 and found.effects[found.heads[0]] == found.effects.max() > 1e-3
    everything = function_vector(model, params, shown, bare, answers, top=8, batch=24)
    assert len(set(everything.heads)) == 8
    out = sites_of(model, params, shown, "blocks.*.attn.out")
    total = sum(value[:, -1].mean(axis=0) for value in out.values())
    np.testing.assert_allclose(everything.vector, total, atol=1e-4)

    def domain(vector: jax.Array) -> float:
        logits = logits_of(model, params, bare, edit={"blocks.0.resid_post": add_vector(vector)})
        return float(jax.nn.softmax(logits[:, -1])[:, 12:22].sum(axis=1).mean())

    noise = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    length = jnp.linalg.norm(found.vector)
    controls = [domain(row * length / jnp.linalg.norm(row)) for row in noise]
    plain = domain(jnp.zeros(32))
    assert domain(found.vector) - plain > 2 * max(abs(control - plain) for control in controls)
    with pytest.raises(SiteError, match="a norm stands between"):
        mean_heads(*tiny("gemma2"), shown)
    with pytest.raises(SiteError, match="padded on the right"):
        mask = np.arange(5)[None] < np.full((24, 1), 4)
        function_vector(model, params, shown, bare, answers, masks=(None, mask))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_value_search_is_a_sort_of_all_cosines(name: str) -> None:
    model, params = tiny(name)
    down = [params[f"blocks_{i}"]["mlp"]["down"] for i in range(2)]
    rows = np.stack([np.asarray(d if name == "mixtral" else d["kernel"]).reshape(-1, 24) for d in down])
    tokens = np.asarray(params["embed"]["embedding"] if name == "gpt2" else params["unembed"]["kernel"].T)
    unit_rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    cosines = unit_rows @ (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).T  # [layer, neuron, token]
    found = value_search(model, params, [3, 17], k=5)
    for i, token in enumerate((3, 17)):
        order = np.argsort(-cosines[..., token].ravel())[:5]
        np.testing.assert_array_equal(found.layers[i] * rows.shape[1] + found.neurons[i], order)
        np.testing.assert_allclose(found.cosines[i], cosines[..., token].ravel()[order], atol=1e-5)
    ids, values = tokens_of_values(model, params, 1, found.neurons[0, :2], k=4)
    expected = np.argsort(-cosines[1, found.neurons[0, :2]], axis=1)[:, :4]
    np.testing.assert_array_equal(ids, expected)
    assert (np.diff(values) <= 0).all()
    vectors = value_search(model, params, rows[1, 7:8] * 3, k=1)
    assert (int(vectors.layers[0, 0]), int(vectors.neurons[0, 0])) == (1, 7)
    with pytest.raises(SiteError, match=r"expected \[directions, 24\]"):
        value_search(model, params, np.ones((1, 23), np.float32))
