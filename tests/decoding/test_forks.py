"""Samples of one prompt, log-probabilities and captured sites: what methods of decoding are built from."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import (
    History,
    Temperature,
    advance,
    begin,
    complete,
    confidence_monitor,
    generate,
    greedy,
    margin_monitor,
    monitor,
    pad_prompts,
    row_keys,
    sample,
    stop_at,
)
from mergelab.decoding.transforms import transform
from mergelab.errors import DecodingError, SiteError
from mergelab.models.sites import as_partials
from tests.decoding.syllables import syllables
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


def test_rows_taken_back_go_on_as_if_they_had_never_been_further() -> None:
    model, params = tiny("llama")
    rules = {"sampler": sample(Temperature(1.5)), "keys": row_keys(3, 3), "stop": stop_at((), [[60, 60]])}
    begun = begin(model, params, *pad_prompts(PROMPTS), max_new_tokens=12, stop=rules["stop"], log_probs=True)

    def on(state, until):  # type: ignore[no-untyped-def]
        return advance(model, params, state, until, edit=as_partials(None), **rules)  # type: ignore[arg-type]

    whole = on(begun, 12)
    back = whole.rewind([2, 7, 12])
    assert back.lengths.tolist() == [2, 7, 12]
    early = on(begun, 2)
    for name in ("seen", "last", "recent"):
        np.testing.assert_array_equal(getattr(back, name)[0], getattr(early, name)[0])
    # Another seed would draw other tokens; the same keys draw the same ones again, each at its place.
    again = back
    for _ in range(10):
        full = on_host_full(again.lengths)
        again = on(replace(again, steps=jnp.int32(0), finished=full), 1)
    np.testing.assert_array_equal(again.tokens[:, :12], whole.tokens[:, :12])
    np.testing.assert_allclose(again.log_probs[:, :12], whole.log_probs[:, :12], atol=1e-4)


def on_host_full(lengths: jax.Array) -> jax.Array:
    """Which rows have their twelve tokens."""
    return jnp.asarray(np.asarray(lengths) >= 12)


def test_completions_of_one_prompt_with_log_probabilities() -> None:
    (model, params), tokenizer = tiny("llama"), syllables()
    options = {"max_new_tokens": 5, "sampler": sample(Temperature(1.5)), "key": 7}
    done = complete(model, params, tokenizer, PROMPTS[:2], samples=3, log_probs=True, **options)
    expected = generate(model, params, *pad_prompts(PROMPTS[:2]), samples=3, log_probs=True, **options)
    assert [list(row.token_ids) for row in done] == expected.rows()
    sums = np.asarray(expected.log_probs, np.float64).sum(axis=1)
    np.testing.assert_allclose([row.log_probability for row in done], sums, rtol=1e-6)
    with pytest.raises(DecodingError, match="2 samples"):
        complete(model, params, tokenizer, PROMPTS[:1], samples=2, max_new_tokens=2, on_text=print)


def test_a_monitor_reads_every_step_and_ends_rows_by_what_it_reads() -> None:
    (model, params), tokenizer = tiny("llama"), syllables()
    site = "blocks.1.resid_post"
    options = {"max_new_tokens": 5, "capture": [site]}
    read = monitor(lambda captured: captured[site][:, :2], readings=2)
    free = complete(model, params, tokenizer, PROMPTS, monitor=read, **options)
    stream = jax.jit(lambda text: model.apply(params, text, capture=site).captured[site])
    for prompt, row in zip(PROMPTS, free, strict=True):
        text = np.zeros((1, 12), np.int32)
        text[0, : len(prompt) + 5] = [*prompt, *row.token_ids]
        held = stream(jnp.asarray(text))[0, len(prompt) - 1 : len(prompt) + 4, :2]
        np.testing.assert_allclose(row.readings, held, atol=1e-4)
    highest = [max(step) for step in free[0].readings]
    bound = sorted(highest)[2]
    place = next(n for n, value in enumerate(highest) if value > bound)
    ending = monitor(lambda captured: captured[site][:, :2], readings=2, above=bound)
    ended = complete(model, params, tokenizer, PROMPTS[:1], monitor=ending, **options)
    assert ended[0].token_ids == free[0].token_ids[: place + 1] and ended[0].stop == "monitor"
    with pytest.raises(DecodingError, match="a number"):
        monitor(lambda captured: captured[site], above=float("nan"))


@pytest.mark.slow
def test_margins_and_confidences_are_those_of_the_models_distribution() -> None:
    model, params = tiny("llama")
    whole = jax.jit(lambda text: model.apply(params, text).logits)
    for rule, of in ((margin_monitor(), _margin), (confidence_monitor(3), _top_three)):
        stop = stop_at(monitor=rule)
        found = generate(model, params, [PROMPTS[0]], max_new_tokens=4, stop=stop, capture=["logits"])
        text = np.zeros((1, 12), np.int32)
        text[0, :10] = [*PROMPTS[0], *found.rows()[0]]
        log_p = np.asarray(jax.nn.log_softmax(whole(jnp.asarray(text))[0, 5:9]), np.float64)
        assert found.readings is not None
        np.testing.assert_allclose(found.readings[0, :, 0], of(np.sort(log_p, axis=1)), atol=1e-4)


def _margin(log_p: np.ndarray) -> np.ndarray:
    return np.exp(log_p[:, -1]) - np.exp(log_p[:, -2])


def _top_three(log_p: np.ndarray) -> np.ndarray:
    return log_p[:, -3:].mean(axis=1)
