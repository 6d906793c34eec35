"""Contrastive decoding and DoLa choose what their formulas choose, computed apart from whole passes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import History, generate, generate_contrastive, greedy, layer_contrast, pad_prompts
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from tests.decoding.tiny import PROMPTS, tiny
from tests.decoding.vocabulary_of_five import five

SITES = ("blocks.0.resid_post", "logits")
NEW = 4


@cache
def run(model: Model) -> object:
    return jax.jit(lambda p, t: model.apply(p, t, capture=SITES).captured)


def whole(loaded: tuple[Model, Params], text: list[int]) -> dict[str, np.ndarray]:
    """What a whole pass over a text, padded on the right to one length, holds at its last token; float64."""
    model, params = loaded
    read = run(model)(params, jnp.asarray([text + [0] * (16 - len(text))], jnp.int32))  # type: ignore[operator]
    return {site: np.asarray(x[0, len(text) - 1], np.float64) for site, x in read.items()}


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def among_plausible(log_p: np.ndarray, scores: np.ndarray, alpha: float) -> int:
    return int(np.argmax(np.where(log_p >= log_p.max() + np.log(alpha), scores, -np.inf)))


def test_contrastive_tokens_are_those_of_the_formula() -> None:
    strong, (model, params) = tiny("llama"), tiny("llama")
    weak = (model, jax.tree.map(lambda x: x * 0.8, params))
    for beta, alpha in ((0.5, 0.1), (None, 0.02)):
        found = generate_contrastive(
            *strong, *weak, *pad_prompts(PROMPTS), max_new_tokens=NEW, alpha=alpha, beta=beta, log_probs=True
        )
        for prompt, row, kept in zip(PROMPTS, found.rows(), np.asarray(found.log_probs), strict=True):
            for place, token in enumerate(row):
                ours, theirs = (whole(one, prompt + row[:place])["logits"] for one in (strong, weak))
                scores = ours - theirs if beta is None else (1 + beta) * ours - beta * theirs
                assert token == among_plausible(log_softmax(ours), scores, alpha)
                assert kept[place] == pytest.approx(log_softmax(ours)[token], abs=1e-4)
        assert found.rows() != generate(*strong, *pad_prompts(PROMPTS), max_new_tokens=NEW).rows()


@pytest.mark.slow
def test_dola_tokens_are_those_of_the_formula() -> None:
    model, params = loaded = tiny("llama")
    dola = layer_contrast(model, params, [0], alpha=0.05)
    found = generate(
        *loaded,
        *pad_prompts(PROMPTS),
        max_new_tokens=NEW,
        sampler=greedy(dola.transform),
        capture=dola.capture,
    )
    scale, kernel = (
        np.asarray(params[a][b], np.float64) for a, b in (("final_norm", "scale"), ("unembed", "kernel"))
    )
    for prompt, row in zip(PROMPTS, found.rows(), strict=True):
        for place, token in enumerate(row):
            read = whole(loaded, prompt + row[:place])
            stream = read["blocks.0.resid_post"]
            normed = stream / np.sqrt(np.square(stream).mean() + model.config.norm.eps) * scale
            late, early = log_softmax(read["logits"]), log_softmax(normed @ kernel)
            assert token == among_plausible(late, late - early, 0.05)
    assert found.rows() != generate(*loaded, *pad_prompts(PROMPTS), max_new_tokens=NEW).rows()


def test_dola_subtracts_the_layer_that_is_furthest_from_the_last() -> None:
    model, params = five(0)
    blocks = model.config.blocks * 4
    deep = replace(model, config=replace(model.config, blocks=blocks))
    dola = layer_contrast(deep, params, [0, 2], alpha=0.01)
    assert dola.capture == ("blocks.0.resid_post", "blocks.2.resid_post")
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6, 5)).astype(np.float32)
    streams = rng.normal(0, 1, (2, 6, 16)).astype(np.float32)
    captured = {site: jnp.asarray(x) for site, x in zip(dola.capture, streams, strict=True)}
    history = History(jnp.zeros((6, 5), bool), jnp.zeros(6, jnp.int32), captured)
    found = np.asarray(jax.jit(lambda x, h: dola.transform(x, h))(logits, history))
    kernel, chosen = np.asarray(params["unembed"]["kernel"], np.float64), []
    scale = np.asarray(params["final_norm"]["scale"], np.float64)
    for row in range(6):
        late, readings = log_softmax(logits[row].astype(np.float64)), []
        for x in streams[:, row].astype(np.float64):
            early = log_softmax(x / np.sqrt(np.square(x).mean() + model.config.norm.eps) * scale @ kernel)
            middle = np.log((np.exp(early) + np.exp(late)) / 2)
            apart = sum((np.exp(x) * (x - middle)).sum() for x in (early, late))
            readings.append((apart, early))
        chosen.append(max((0, 1), key=lambda n, readings=readings: readings[n][0]))
        expected = late - readings[chosen[-1]][1]
        plausible = late >= late.max() + np.log(0.01)
        np.testing.assert_allclose(found[row][plausible], expected[plausible], atol=1e-4)
        assert (found[row][~plausible] == -np.inf).all()
    assert len(set(chosen)) == 2


def test_what_contrasts_refuse() -> None:
    model, params = tiny("llama")
    with pytest.raises(DecodingError, match="the two must have one vocabulary"):
        generate_contrastive(model, params, *five(0), [[1]], max_new_tokens=2)
    with pytest.raises(DecodingError, match=r"alpha\) was given 2"):
        generate_contrastive(model, params, model, params, [[1]], max_new_tokens=2, alpha=2)
    with pytest.raises(DecodingError, match="layers from 0 to 0, at least one"):
        layer_contrast(model, params, [1])
