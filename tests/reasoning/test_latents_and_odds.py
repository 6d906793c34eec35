"""Latent steps, injected concepts and odds of ending: no change is none, and each is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import generate, stop_at
from mergelab.errors import DecodingError, SiteError, TokenError
from mergelab.models.load import load_model
from mergelab.reasoning.concept_injection import concept_vectors, inject_concepts
from mergelab.reasoning.decision_odds import odds_monitor, read_ending_odds
from mergelab.reasoning.latent_steps import (
    compare_latent_steps,
    generate_after_latent_steps,
    latent_edit,
    latent_steps_of,
)
from mergelab.text.tokenizer import load_tokenizer
from tests.interp.running import logits_of, sites_of
from tests.models.tiny_models import tiny
from tests.tuning import small

PROMPTS = [[3, 14, 15, 9], [26, 5]]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_latent_steps_feed_the_last_stream_back(name: str) -> None:
    """Step by step, without a cache: each vector is what the last norm gives behind those before it."""
    model, params = tiny(name)
    found = latent_steps_of(model, params, PROMPTS, 2)
    assert found.tokens.shape == (2, 6) and found.vectors.shape == (2, 2, 24)
    mask = jnp.asarray(found.mask)
    first = sites_of(model, params, found.tokens, "unembed.input", mask=mask)["unembed.input"][:, 3]
    np.testing.assert_allclose(found.vectors[:, 0], first, atol=1e-4)
    edit = latent_edit(model, params, found)
    logits = logits_of(model, params, found.tokens, mask=mask, edit=edit)
    # The fourth column is the prompt's last, the fifth the first step: it says what the second was made of.
    np.testing.assert_array_equal(found.likeliest, logits[:, 3:5].argmax(-1))
    chosen = logits[:, 3:5].max(-1) - np.log(np.exp(logits[:, 3:5]).sum(-1))
    np.testing.assert_allclose(found.log_probs, chosen, atol=1e-4)
    assert np.abs(logits - logits_of(model, params, found.tokens, mask=mask))[:, 4:].max() > 0.1
    # A generation behind the steps begins with what the last of them says.
    made = generate_after_latent_steps(model, params, found, max_new_tokens=2, log_probs=True)
    np.testing.assert_array_equal(np.asarray(made.tokens)[:, 0], logits[:, 5].argmax(-1))
    if name == "gpt2":
        return
    filler = latent_steps_of(model, params, PROMPTS, 2, kind="filler", filler=7)
    assert np.abs(np.asarray(latent_edit(model, params, filler)["embed"].args[0])).max() < 1e-6
    random = latent_steps_of(model, params, PROMPTS, 2, kind="random")
    lengths = [np.linalg.norm(one.vectors, axis=-1) for one in (found, random)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    shuffled = latent_steps_of(model, params, PROMPTS, 2, kind="shuffled")
    np.testing.assert_array_equal(shuffled.vectors, found.vectors[::-1])
    tried = compare_latent_steps(model, params, PROMPTS, [4, 5], steps=(0, 2), filler=7)
    assert len({values[0] for values in tried.values()}) == 1, "no steps are no steps of any kind"
    assert len({round(values[1], 4) for values in tried.values()}) == 4


def test_no_latent_steps_are_ordinary_generation() -> None:
    model, params = tiny("llama")
    none = latent_steps_of(model, params, PROMPTS, 0)
    made = generate_after_latent_steps(model, params, none, max_new_tokens=3, log_probs=True)
    plain = generate(model, params, none.tokens, none.mask, max_new_tokens=3, log_probs=True)
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    np.testing.assert_array_equal(np.asarray(made.log_probs), np.asarray(plain.log_probs))
    with pytest.raises(DecodingError, match="0 or more"):
        latent_steps_of(model, params, PROMPTS, -1)
    with pytest.raises(DecodingError, match="cannot be shuffled"):
        latent_steps_of(model, params, PROMPTS[:1], 1, kind="shuffled")


def test_odds_of_ending_are_read_behind_every_token_and_while_it_is_written() -> None:
    model, params = tiny("llama")
    ends, others = [2, 5], [7, 8, 9]
    stop = stop_at(monitor=odds_monitor(ends, others, 61))
    made = generate(model, params, np.array([PROMPTS[0]]), max_new_tokens=4, stop=stop, capture="logits")
    text = [*PROMPTS[0], *np.asarray(made.tokens)[0].tolist()]
    found = read_ending_odds(model, params, [text, text[2:]], ends, others)
    logits = logits_of(model, params, [text]).astype(np.float64)[0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.end[0], np.log(p[:, ends].sum(-1)), atol=1e-4)
    np.testing.assert_allclose(found.other[0], np.log(p[:, others].sum(-1)), atol=1e-4)
    assert made.readings is not None
    # The pass that chose a token is the one behind the token before it.
    np.testing.assert_allclose(np.asarray(made.readings)[0, :, 0], found.log_odds[0, 3:7], atol=1e-4)
    for wrong, message in (([], "at least one"), ([61], "below 61"), ([2], "among ends and others")):
        with pytest.raises(TokenError, match=message):
            read_ending_odds(model, params, [text], ends, wrong)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder: Path = small.write(tmp_path_factory.mktemp("concepts") / "base")
    model, params = load_model(folder)
    noise = np.random.default_rng(0).normal(0, 1, params["embed"]["embedding"].shape)
    params = {**params, "embed": {"embedding": jnp.asarray(noise, jnp.float32)}}
    return model, params, load_tokenizer(folder)


def test_an_injected_concept_is_named_and_strength_0_is_nothing(words: tuple[Any, Any, Any]) -> None:
    """A vector that is a word's own output embedding is named; random vectors of its length are not."""
    model, params, tokenizer = words
    site = "blocks.0.resid_post"
    vectors = {f"w{n}": params["embed"]["embedding"][n + 3] for n in (1, 4)}
    found = inject_concepts(
        model, params, tokenizer, vectors, site, strengths=(0, 10), question="w7 w8", control="w9",
        naming="w2", yes="w20", no="w21", chat=False, draws=3, max_new_tokens=2, batch=4,
    )  # fmt: skip
    assert found.odds.shape == (2, 2) and found.random_odds.shape == (3, 2)
    np.testing.assert_array_equal(found.odds[:, 0], found.unmoved[0])
    np.testing.assert_array_equal(found.random_control_odds[:, 0], found.unmoved[1])
    assert found.noticed[0] == 0 and not found.named[:, 0].any()
    assert (found.named[:, 1] > found.random_named[:, 1] + 2).all()
    assert found.texts[0][1].split()[0] == "w1" and found.texts[1][1].split()[0] == "w4"
    plain = generate(model, params, np.array([tokenizer.encode("w7 w8")]), max_new_tokens=2)
    assert found.texts[0][0] == tokenizer.decode(plain.rows()[0])
    with pytest.raises(SiteError, match="cannot be added"):
        inject_concepts(model, params, tokenizer, {"w1": np.zeros(3)}, site)


def test_a_concepts_vector_is_its_prompts_less_the_mean_of_others(words: tuple[Any, Any, Any]) -> None:
    model, params, tokenizer = words
    options: dict[str, Any] = {"others": ("w5", "w6"), "about": "w9 {}", "chat": False}
    found = concept_vectors(model, params, tokenizer, ["w1", "w2"], "blocks.0.resid_post", **options)
    rows = np.array([tokenizer.encode(f"w9 {word}") for word in ("w1", "w2", "w5", "w6")])
    held = sites_of(model, params, rows, "blocks.0.resid_post")["blocks.0.resid_post"][:, -1]
    np.testing.assert_allclose(found["w2"], held[1] - held[2:].mean(axis=0), atol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure({"w1": 0, "w2": 0})
    with pytest.raises(SiteError, match="cannot be read"):
        concept_vectors(model, params, tokenizer, [], "blocks.0.resid_post")
