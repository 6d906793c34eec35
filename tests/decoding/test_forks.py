"""Samples of one prompt, log-probabilities and captured sites: what methods of decoding are built from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import History, Temperature, generate, greedy, pad_prompts, row_keys, sample, stop_at
from mergelab.decoding.transforms import transform
from mergelab.errors import DecodingError, SiteError
from tests.decoding.tiny import PROMPTS, tiny

SITES = ("blocks.*.resid_post", "blocks.0.attn.pattern")


def test_samples_of_a_prompt_are_those_of_the_prompt_repeated() -> None:
    model, params = tiny("llama")
    options = {"max_new_tokens": 5, "sampler": sample(Temperature(1.5))}
    forked = generate(model, params, *pad_prompts(PROMPTS[:2]), key=7, samples=3, **options)
    repeated = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    expected = generate(model, params, *pad_prompts(repeated), key=row_keys(7, 6), **options)
    np.testing.assert_array_equal(forked.tokens, expected.tokens)
    assert len({tuple(row) for row in forked.rows()}) == 6
    with pytest.raises(DecodingError, match=r"samples.* was given 0"):
        generate(model, params, *pad_prompts(PROMPTS), samples=0, **options)


def test_log_probabilities_and_captured_sites_are_those_of_one_pass_over_the_text() -> None:
    model, params = tiny("llama")
    free = generate(model, params, *pad_prompts(PROMPTS), max_new_tokens=6)
    assert free.log_probs is None and free.captured == {}
    stop = stop_at([free.rows()[0][1]])
    found = generate(
        model, params, *pad_prompts(PROMPTS), max_new_tokens=6, stop=stop, log_probs=True, capture=SITES
    )
    assert found.log_probs is not None
    assert set(found.captured) == {"blocks.0.resid_post", "blocks.1.resid_post", "blocks.0.attn.pattern"}
    whole = jax.jit(lambda text: model.apply(params, text, capture=SITES))
    for row, (prompt, new) in enumerate(zip(PROMPTS, found.rows(), strict=True)):
        end = len(prompt) + len(new)
        text = np.zeros((1, 12), np.int32)
        text[0, :end] = [*prompt, *new]
        output = whole(jnp.asarray(text))
        log_probs = jax.nn.log_softmax(output.logits)[0, np.arange(len(prompt) - 1, end - 1), np.array(new)]
        np.testing.assert_allclose(found.log_probs[row, : len(new)], log_probs, atol=1e-4)
        assert not found.log_probs[row, len(new) :].any()
        stream = output.captured["blocks.1.resid_post"][0]
        last, before = stream[end - 2], stream[end - 3]
        np.testing.assert_allclose(found.captured["blocks.1.resid_post"][row], last, atol=1e-4)
        assert np.abs(np.asarray(found.captured["blocks.1.resid_post"][row] - before)).max() > 1e-2
    assert len(found.rows()[0]) == 2
    np.testing.assert_allclose(found.captured["blocks.0.attn.pattern"].sum(-1), 1.0, atol=1e-5)
    with pytest.raises(SiteError, match="no site"):
        generate(model, params, *pad_prompts(PROMPTS), max_new_tokens=6, capture=["blocks.9.mlp"])


@transform
class FromEarlyLayer:
    """The tokens that an early layer points to, as layer-contrastive methods read it."""

    unembed: jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return jnp.matmul(history.captured["blocks.0.resid_post"], self.unembed)


def test_a_transform_sees_the_sites_of_its_step() -> None:
    model, params = tiny("llama")
    kernel = params["unembed"]["kernel"]
    sampler = greedy(FromEarlyLayer(kernel))
    prompt = jnp.asarray(PROMPTS[0])[None]
    found = generate(
        model, params, prompt, max_new_tokens=1, sampler=sampler, capture=["blocks.0.resid_post"]
    )
    stream = model.apply(params, prompt, capture=["blocks.0.resid_post"]).captured["blocks.0.resid_post"]
    assert found.rows() == [[int(jnp.argmax(stream[0, -1] @ kernel))]]
    assert found.rows() != generate(model, params, prompt, max_new_tokens=1).rows()
